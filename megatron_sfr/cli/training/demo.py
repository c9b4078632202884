"""Train a small model with and without SFR on a world whose truth is known, and compare.

Needs no download and no GPU: at most ten minutes on two cores. A second call goes on where the first one stopped.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder to write (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few steps only: shows that all of it runs, nothing more")
    parser.add_argument("--verbose", action="store_true", help="show Megatron's output instead of progress bars")


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.demo.run import demo
    from megatron_sfr.demo.scale import FULL, TINY

    demo(args.output, TINY if args.tiny else FULL, verbose=args.verbose)
    return 0
