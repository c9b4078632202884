"""Train a small model with and without SFR on a world in which all correct replies are known, and compare.

Needs no download and no GPU, and is designed for ten minutes on two cores. A second call resumes an unfinished demo.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder to write (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="run a few steps only, to check that everything works")
    parser.add_argument("--verbose", action="store_true", help="show Megatron's output instead of progress bars")


def run(args: argparse.Namespace) -> int:
    if args.output.exists() and not args.output.is_dir():  # before the demo's imports, which take seconds
        raise ValueError(f"{args.output} is a file: choose another --output")

    from megatron_sfr.demo.run import demo
    from megatron_sfr.demo.scale import FULL, TINY

    demo(args.output, TINY if args.tiny else FULL, verbose=args.verbose)
    return 0
