"""Compare models over a sweep of temperatures: diversity against quality.

Every model answers the prompts of a file of conversations, whose replies are the references. The first model is the
baseline. Writes report.html, which is self-contained, report.md, evaluation.json, samples.jsonl and frontier.png.
"""

import argparse
from pathlib import Path

from megatron_sfr.cli.model_args import add_model_arguments, model_folders, sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="JSONL of conversations held out of training"
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
    parser.add_argument("--limit", type=int, default=64, help="at most this many different prompts (%(default)s)")
    parser.add_argument("--encoder", default="minilm", metavar="NAME_OR_DIR", help="sentence encoder (%(default)s)")
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


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.storage.integrity import hint
    from megatron_sfr.storage.lock import hold
    from megatron_sfr.storage.provenance import is_up_to_date

    if args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least one prompt is needed")
    last, identity = args.output / "evaluation.json", _identity(args)
    with hint("choose another --output, or remove the file"):
        done = is_up_to_date(last, last, identity)
    if done:
        print(f"{args.output} is up to date")
        return 0
    with hold(args.output, inside=True):
        _evaluate(args, identity)
    return 0


def _identity(args: argparse.Namespace) -> dict[str, object]:
    """Everything that determines the report. An encoder given by name is identified by its name."""
    from megatron_sfr.storage.integrity import sha256_of
    from megatron_sfr.storage.provenance import contents_of

    sampling = ("samples", "top_k", "top_p", "max_new_tokens", "seed", "batch_size", "device", "dtype")
    template = ("persona_as", "template_kwargs", "template_date", "special_text")
    scoring = ("temperatures", "one_temperature", "limit", "encoder", "pairs", "embedded", "bleu_tokenize")
    folders = model_folders(args.model)
    return {
        "models": {name: contents_of(folder) for name, folder in folders.items() if folder.is_dir()},
        "baseline": next(iter(folders)),
        "data": sha256_of(args.data),
        "encoder": contents_of(Path(args.encoder)) if Path(args.encoder).is_dir() else None,
        "options": {name: getattr(args, name) for name in (*sampling, *template, *scoring)},
    }


def _evaluate(args: argparse.Namespace, identity: dict[str, object]) -> None:
    from megatron_sfr.evaluation.compare.curves import EvaluationOptions
    from megatron_sfr.evaluation.compare.evaluate_models import evaluate
    from megatron_sfr.evaluation.compare.replies import Hardware

    options = EvaluationOptions(
        sampling=sampling_options(args),
        temperatures=tuple(sorted(args.temperatures)),
        pairs=args.pairs,
        embedded=args.embedded,
        bleu_tokenize=args.bleu_tokenize,
        one_temperature=args.one_temperature,
    )
    evaluate(
        model_folders(args.model),
        args.data,
        args.output,
        options,
        max_prompts=args.limit,
        encoder=args.encoder,
        hardware=Hardware(args.device, args.dtype, args.processes),
        identity=identity,
    )
