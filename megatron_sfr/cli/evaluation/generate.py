"""Sample replies from Hugging Face models, or from an OpenAI-compatible server.

Replies to one prompt are printed; replies to a file of prompts are written to a JSONL file. Equal commands give equal
replies, and several models share their random numbers. The same command resumes a stopped run and writes the same file.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sfr.cli.engine_args import add_engine_arguments, add_model_arguments, engine_of
from megatron_sfr.cli.model_args import add_sampling_arguments, sampling_options

if TYPE_CHECKING:
    from megatron_sfr.evaluation.generate.engines import Engine
    from megatron_sfr.evaluation.generate.prompts import Prompt
    from megatron_sfr.evaluation.generate.sampling import SamplingOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser.add_mutually_exclusive_group(required=True))
    add_sampling_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one user turn; the replies are printed")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL records with prompt or messages, and optionally persona"
    )
    parser.add_argument("--persona", metavar="NAME", help="persona that answers --prompt")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSONL file to write")
    parser.add_argument(
        "--verbalized",
        type=int,
        metavar="K",
        help="Verbalized Sampling: ask for K replies with probabilities at a time, and draw one by these weights",
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.evaluation.generate.prompts import ask, read_prompts

    if args.prompts is not None and args.persona is not None:
        raise ValueError("--persona goes with --prompt; in a file each record names its own")
    if (args.prompts is None) != (args.output is None):
        raise ValueError("--prompts needs --output FILE for the replies; --prompt prints them and takes no --output")
    options = sampling_options(args)
    place = options.template.persona_as
    prompts = read_prompts(args.prompts, place) if args.prompts else [ask(args.prompt, args.persona, place)]
    engine = _engine(args)
    if args.output:
        _write(engine, prompts, options, args.output)
    else:
        _print(engine, prompts, options)
    return 0


def _engine(args: argparse.Namespace) -> "Engine":
    from megatron_sfr.evaluation.generate.verbalized import Verbalized

    engine = engine_of(args, add_arguments)
    return engine if args.verbalized is None else Verbalized(engine, args.verbalized)


def _write(engine: "Engine", prompts: "list[Prompt]", options: "SamplingOptions", output: Path) -> None:
    """Writes every reply of every model as a line, and resumes an earlier run."""
    from tqdm import tqdm

    from megatron_sfr.evaluation.generate.sampling import reply_line
    from megatron_sfr.evaluation.generate.verbalized import Verbalized, unreadable
    from megatron_sfr.storage.resumable import is_finished, resumable

    each = len(prompts) * options.samples
    engine.check()
    identity = _identity(engine, prompts, options)

    def boundary(lines: int) -> int:
        done = lines % each
        return lines - done + engine.kept(done, options)

    if is_finished(output, identity):
        print(f"{output} is up to date")
        return
    total = len(engine.models) * each
    with (
        resumable(output, identity, boundary) as (file, done),
        tqdm(total=total, initial=done, unit="reply", dynamic_ncols=True) as bar,
    ):
        for name in engine.models[done // each :]:
            bar.set_description(name)
            model = engine.load(name, options.template)
            for p, reply in engine.sample(model, prompts, options, start=done % each):
                file.write(reply_line(name, prompts[p], options, reply))
                bar.update()
            del model  # its memory is free before the next one is loaded
            done = 0
    print(f"{output}: {total:,} replies")
    if isinstance(engine, Verbalized):
        _report_unreadable(unreadable(output), total)


def _identity(engine: "Engine", prompts: "list[Prompt]", options: "SamplingOptions") -> dict[str, object]:
    """Everything that determines the replies."""
    from dataclasses import asdict

    return engine.identity() | {
        "prompts": [prompt.messages for prompt in prompts],
        "personas": [prompt.persona for prompt in prompts],
        "options": asdict(options),
    }


def _print(engine: "Engine", prompts: "list[Prompt]", options: "SamplingOptions") -> None:
    """Prints every model's replies."""
    engine.check()
    empty, total = 0, 0
    for name in engine.models:
        model = engine.load(name, options.template)
        for _, reply in engine.sample(model, prompts, options):
            empty, total = empty + (reply.verbalized is not None and not reply.verbalized.candidates), total + 1
            print(f"[{name}] {reply.text}" if len(engine.models) > 1 else reply.text, flush=True)
        del model  # its memory is free before the next one is loaded
    _report_unreadable(empty, total)


def _report_unreadable(empty: int, total: int) -> None:
    """Says how many answers of Verbalized Sampling hold no reply."""
    if empty:
        print(
            f"{empty:,} of {total:,} answers hold no reply with its tags, which leaves an empty reply; give more "
            "--max-new-tokens if they were cut off",
            file=sys.stderr,
        )
