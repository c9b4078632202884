"""Compare models over a sweep of temperatures: diversity against quality.

Every model answers the prompts of a file of conversations, whose replies are the references. Models are Hugging Face
folders, or those of an OpenAI-compatible server. Replies that exist already are read from files (--replies); then no
model is loaded, and the conversations are optional. The first model is the baseline. Writes report.html, which is
self-contained, report.md, evaluation.json, frontier.png and, for models that were sampled, samples.jsonl. With --judge
a language model rates the replies too; its votes are in votes.jsonl.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sfr.cli.engine_args import ENGINE, add_engine_arguments, add_model_arguments, engine_of, refuse_given
from megatron_sfr.cli.judge_args import add_judge_arguments, judge_of
from megatron_sfr.cli.model_args import SAMPLING, TEMPLATE, add_sampling_arguments, sampling_options, split_name

if TYPE_CHECKING:
    from megatron_sfr.evaluation.judge.judge_replies import Judge

SCORING = ("limit", "encoder", "pairs", "embedded", "bleu_tokenize", "device")
SWEEP = ("temperatures", "one_temperature", "processes")
MOST_PROMPTS = 64  # sampling takes time; replies that exist are all scored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    add_model_arguments(what)
    what.add_argument(
        "--replies",
        nargs="+",
        action="extend",
        metavar="[NAME=]FILE",
        help="JSONL of replies by any program (NAME defaults to the record's model, else to the file's name)",
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSONL of conversations held out of training; optional with --replies, which are then scored without "
        "references",
    )
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=float,
        default=[0.5, 0.7, 1.0, 1.3],
        metavar="T",
        help="temperatures to sample at (0.5 0.7 1.0 1.3)",
    )
    parser.add_argument(
        "--one-temperature", action="store_true", help="accept a single temperature, which says little about diversity"
    )
    parser.add_argument(
        "--limit", type=int, help=f"at most this many different prompts ({MOST_PROMPTS}; with --replies: all)"
    )
    parser.add_argument(
        "--encoder",
        default="minilm",
        metavar="NAME_OR_DIR",
        help="sentence encoder; none: scores by words only, with --replies (%(default)s)",
    )
    parser.add_argument("--pairs", type=int, default=16, help="BLEU comparisons per prompt and persona (%(default)s)")
    parser.add_argument(
        "--bleu-tokenize",
        choices=("auto", "13a", "intl", "zh", "char", "ja-mecab", "ko-mecab"),
        default="auto",
        help="sacrebleu's tokenizer, used for distinct-n too if words have no spaces (auto: by the script of the text)",
    )
    parser.add_argument("--embedded", type=int, default=4, help="replies embedded per prompt and persona (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="models evaluated in parallel, for CPUs (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add_engine_arguments(parser)
    add_judge_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.targets.encoder import check_encoder
    from megatron_sfr.storage.integrity import hint
    from megatron_sfr.storage.lock import hold
    from megatron_sfr.storage.provenance import is_up_to_date

    _check(args)
    if args.encoder != "none":
        check_encoder(args.encoder)
    judge = judge_of(args, add_arguments)
    last, identity = args.output / "evaluation.json", _identity(args) | (judge.identity() if judge else {})
    with hint("choose another --output, or remove the file"):
        done = is_up_to_date(last, last, identity)
    if done:
        print(f"{args.output} is up to date")
        return 0
    with hold(args.output, inside=True):
        (_evaluate_replies if args.replies else _evaluate_models)(args, judge, identity)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are missing, or that have no effect with the others."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least one prompt is needed")
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes}: give at least 1")
    if not args.replies:
        if args.data is None:
            raise ValueError(
                f"{'--model' if args.model else '--server'} needs --data FILE, whose prompts the models answer"
            )
        if args.encoder == "none":
            raise ValueError("--encoder none goes with --replies; models are compared with real replies by embeddings")
        if args.server is not None or args.engine == "vllm":
            refuse_given(args, add_arguments, ("processes",), "is for models that transformers samples")
        return
    about_sampling = (*SAMPLING, *SWEEP, *ENGINE, *(name for name in TEMPLATE if name != "persona_as"))
    refuse_given(args, add_arguments, about_sampling, "is about sampling and has no effect on --replies, which exist")


def _reply_files(args: argparse.Namespace) -> dict[Path, str | None]:
    """{file: name of its model, or None} of --replies."""
    files: dict[Path, str | None] = {}
    for text in args.replies:
        name, path = split_name(text)
        if name == "":
            raise ValueError(f"--replies {text}: the name is empty; write NAME=FILE or FILE")
        if Path(path) in files:
            raise ValueError(f"--replies: {path} is given twice")
        files[Path(path)] = name
    return files


def _identity(args: argparse.Namespace) -> dict[str, object]:
    """Everything that determines the report. An encoder given by name is identified by its name."""
    from megatron_sfr.storage.integrity import sha256_of
    from megatron_sfr.storage.provenance import contents_of

    identity: dict[str, object] = {
        "data": sha256_of(args.data) if args.data else None,
        "encoder": contents_of(Path(args.encoder)) if Path(args.encoder).is_dir() else None,
    }
    if args.replies:
        files = _reply_files(args)
        replies = [(str(path), name, sha256_of(path)) for path, name in files.items()]
        return identity | {
            "replies": replies,
            "options": {name: getattr(args, name) for name in (*SCORING, "persona_as")},
        }
    engine = engine_of(args, add_arguments, encodes=True)
    options = (*SAMPLING, *TEMPLATE, "temperatures", "one_temperature", *SCORING)
    return identity | {
        "models": engine.identity(),
        "baseline": engine.models[0],
        "options": {name: getattr(args, name) for name in options},
    }


def _evaluate_models(args: argparse.Namespace, judge: "Judge | None", identity: dict[str, object]) -> None:
    from megatron_sfr.evaluation.compare.evaluate_models import evaluate_engine
    from megatron_sfr.evaluation.compare.questions import EvaluationOptions

    options = EvaluationOptions(
        sampling=sampling_options(args),
        temperatures=tuple(sorted(args.temperatures)),
        pairs=args.pairs,
        embedded=args.embedded,
        bleu_tokenize=args.bleu_tokenize,
        one_temperature=args.one_temperature,
    )
    evaluate_engine(
        engine_of(args, add_arguments, encodes=True),
        args.data,
        args.output,
        options,
        max_prompts=args.limit or MOST_PROMPTS,
        encoder=args.encoder,
        device=args.device,
        processes=args.processes,
        judge=judge,
        identity=identity,
    )


def _evaluate_replies(args: argparse.Namespace, judge: "Judge | None", identity: dict[str, object]) -> None:
    from megatron_sfr.evaluation.compare.evaluate_replies import evaluate_replies
    from megatron_sfr.evaluation.compare.questions import EvaluationOptions
    from megatron_sfr.evaluation.generate.sampling import SamplingOptions

    scoring = {"pairs": args.pairs, "embedded": args.embedded, "bleu_tokenize": args.bleu_tokenize}
    evaluate_replies(
        _reply_files(args),
        args.output,
        args.data,
        EvaluationOptions(SamplingOptions(), **scoring),
        max_prompts=args.limit,
        encoder=None if args.encoder == "none" else args.encoder,
        device=args.device,
        persona_as=args.persona_as,
        judge=judge,
        identity=identity,
    )
