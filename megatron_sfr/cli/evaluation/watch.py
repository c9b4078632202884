"""Sample and score each new checkpoint of a run while it trains, so that collapse is seen as it happens.

Every checkpoint answers the same prompts with the same random numbers. Writes watch.jsonl (one line per step),
watch.html (scores over steps, and the replies), replies/ (as generate writes them), and scalars for TensorBoard. Ends
when the run has its last step. The same command, started again, continues. It only reads the run's files.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sfr.cli.model_args import add_sampling_arguments, sampling_options

NICE = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the --save folder of a run")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL records with prompt or messages, and optionally persona; a reply at the end is a reference",
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR",
        help="folder with the model's config and tokenizer (default: the sfr_hf_load of the run)",
    )
    add_sampling_arguments(parser, device="cpu")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding (%(default)s)"
    )
    parser.add_argument(
        "--encoder",
        default="minilm",
        metavar="NAME",
        help="sentence-transformers model, or minilm; none: scores by words only (%(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="score the checkpoints that are there, and end")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the folder to write (default: RUN/watch, and RUN/tensorboard/watch for TensorBoard)",
    )


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from megatron_sfr.data.targets.encoder import check_encoder
    from megatron_sfr.evaluation.generate.prompts import read_questions
    from megatron_sfr.watch.run_folder import events_of, open_run

    if not args.run_folder.is_dir():
        raise ValueError(f"{args.run_folder} does not exist; give the --save folder of a run, once the run has begun")
    sampling, found = sampling_options(args), open_run(args.run_folder, args.like)
    output = args.output or args.run_folder / "watch"
    events = args.output / "tensorboard" if args.output else events_of(args.run_folder) / "watch"
    encoder = None if args.encoder == "none" else args.encoder
    if encoder is not None:
        check_encoder(encoder)
    asked = read_questions(args.prompts, args.persona_as)

    from megatron_sfr.watch.step_scores import StepScorer, WatchOptions  # imports torch, as what follows does
    from megatron_sfr.watch.watch_run import watch

    options = WatchOptions(sampling, encoder, args.device, args.dtype)
    with _beside_a_training():
        say = partial(print, flush=True)
        watch(found, output, events, StepScorer(asked, options), _identity(args), once=args.once, say=say)
    return 0


def _identity(args: argparse.Namespace) -> dict[str, object]:
    """Everything that determines the scores of a checkpoint. An encoder given by name is identified by its name."""
    from dataclasses import asdict

    from megatron_sfr.storage.integrity import sha256_of
    from megatron_sfr.storage.provenance import contents_of

    return {
        "prompts": sha256_of(args.prompts),
        "encoder": contents_of(Path(args.encoder)) if Path(args.encoder).is_dir() else args.encoder,
        "dtype": args.dtype,
        "sampling": asdict(sampling_options(args)),
    }


@contextmanager
def _beside_a_training() -> Iterator[None]:
    """Gives way to processes of normal priority, and removes temporary files also at SIGTERM, which ends jobs."""
    os.nice(max(0, NICE - os.nice(0)))
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
