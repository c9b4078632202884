"""Train a recipe on this machine: starts torchrun and shows a progress bar."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-sfr train`; all others are passed to Megatron."""
    parser.add_argument(
        "recipe", type=Path, help="YAML file of Megatron's option names and ours (--recipe adds more files)"
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes to start (default 1)")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="how often to restart all processes from the last checkpoint after a failure (default 0)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's output instead of a progress bar")
    parser.add_argument("--dry-run", action="store_true", help="print the torchrun command and stop")
    parser.set_defaults(passes_flags_on=True)


def run(args: argparse.Namespace) -> int:
    """Trains. args.flags holds the flags for Megatron."""
    from megatron_sfr import launch

    if args.nproc < 1:
        raise ValueError(f"--nproc {args.nproc}: at least one process is needed")
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts}: give 0 or more")
    if args.dry_run:
        launch.read_run(args.recipe, args.flags)
        print(launch.show(args.recipe, args.nproc, args.flags, args.max_restarts))
        return 0
    launch.train(
        args.recipe,
        args.nproc,
        args.flags,
        max_restarts=args.max_restarts,
        verbose=args.verbose,
        title=args.recipe.stem,
    )
    return 0
