"""Check whether training works on this machine, and print what to do if something is missing.

Prints one line per finding. The exit code is 0 if training would work (notes concern optional parts), else 2.
Packages are checked by their metadata; --deep also imports Megatron and the sentence encoders, which takes longer and
finds a broken shared library.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument(
        "--deep", action="store_true", help="also import Megatron and the sentence encoders, in separate processes"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.doctor.finding import print_findings
    from megatron_sfr.doctor.machine_checks import MachineChecks

    checks = MachineChecks(args.deep)
    problems = print_findings(checks.findings(args.folder))
    if problems:
        print(f"training would not work: problems: {problems}")
        return 2
    gpus = len(checks.facts.gpus) if checks.facts else 0
    where = f"on {gpus} GPUs (NCCL)" if gpus else "on CPU (gloo)"
    print(f"training works here, {where}" if args.deep else f"nothing is missing for training here, {where}")
    return 0
