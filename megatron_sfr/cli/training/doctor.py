"""Check whether training works on this machine, and print what to do if something is missing.

Prints one line per finding. The exit code is 0 if training would work (notes concern optional parts), else 2.
Packages are checked by their metadata; --deep also imports Megatron and the sentence encoders, which takes longer and
finds a broken shared library. With --cluster, run in every process of a job by torchrun or srun, it compares and
measures the hosts of the job instead.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument(
        "--deep", action="store_true", help="also import Megatron and the sentence encoders, in separate processes"
    )
    group = parser.add_argument_group("the hosts of a job")
    group.add_argument("--cluster", action="store_true", help="compare and measure all hosts of this job")
    group.add_argument("--shared", type=Path, metavar="DIR", help="a folder that all hosts should share, to be checked")
    group.add_argument("--limit", type=float, metavar="SECONDS", help="time that each step may take (default: 60)")
    group.add_argument(
        "--slow", type=float, metavar="SHARE", help="share of the median speed below which is a problem (default: 0.5)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    if args.cluster:
        return _check_cluster(args)
    for name in ("shared", "limit", "slow", "json"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for --cluster: give both, or leave it out")
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


def _check_cluster(args: argparse.Namespace) -> int:
    from megatron_sfr.doctor.cluster_doctor import ClusterOptions, check_cluster

    if args.deep:
        raise ValueError("--deep checks one machine: leave it out with --cluster")
    given = {"limit_s": args.limit, "slow": args.slow}
    for name, value in given.items():
        if value is not None and not 0 < value < 1e6:
            raise ValueError(f"--{name.removesuffix('_s')} {value}: give a number above 0")
    chosen = {name: value for name, value in given.items() if value is not None}
    return check_cluster(ClusterOptions(shared=args.shared, as_json=args.json, **chosen))
