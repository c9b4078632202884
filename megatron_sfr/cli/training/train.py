"""Train a recipe on this machine: starts torchrun and shows a progress bar."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-sfr train`; whatever is not listed here goes to Megatron."""
    parser.add_argument("recipe", type=Path, help="YAML file of Megatron's flag names and ours (--recipe adds more)")
    parser.add_argument("--nproc", type=int, default=1, help="processes to start (default 1)")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="times to start all processes again from the last checkpoint after one of them failed (default 0)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's output instead of a progress bar")
    parser.add_argument("--dry-run", action="store_true", help="print the torchrun command and stop")
    parser.set_defaults(passes_flags_on=True)


def run(args: argparse.Namespace) -> int:
    """Trains; the flags that this command does not know are in args.flags."""
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
