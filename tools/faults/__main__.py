"""Faults on purpose: damaged inputs, and kills, of every command: `python -m tools.faults fuzz | kill | train`."""

import argparse
import os
import sys
from pathlib import Path

WORK, ROOT = Path("runs/faults"), Path(__file__).parents[2]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools.faults", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="for inputs and copies (%(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    fuzz = verbs.add_parser("fuzz", help="damaged and hostile inputs")
    fuzz.add_argument("--cases", type=int, default=1000, help="(%(default)s)")
    fuzz.add_argument("--first", type=int, default=0, help="the number of the first case (%(default)s)")
    fuzz.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these cases; the last one's copy stays")
    fuzz.add_argument("--command", nargs="+", default=[], help="only cases of these commands")
    fuzz.add_argument("--without", nargs="+", default=[], metavar="COMMAND", help="no cases of these commands")
    fuzz.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    kill = verbs.add_parser("kill", help="kills of every command")
    kill.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    kill.add_argument("--command", nargs="+", default=[], help="only these commands")
    kill.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    train = verbs.add_parser("train", help="kills of trainings through their launcher")
    train.add_argument("--kills", type=int, default=60, help="(%(default)s)")
    train.add_argument("--steps", type=int, default=24, help="of each training (%(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    from tools.faults import fork_server, materials

    fork_server.warm_up()
    work = args.work.resolve()
    if not (work / "inputs").exists():
        work.mkdir(parents=True, exist_ok=True)
        print(f"making inputs in {work / 'inputs'}", flush=True)
        materials.make(work / "inputs", fork_server.run)
    return {"fuzz": _fuzz, "kill": _kill, "train": _train}[args.verb](args, work)


def _fuzz(args: argparse.Namespace, work: Path) -> int:
    from tools.faults import materials
    from tools.faults.fuzz import fuzz, table

    numbers = args.only or range(args.first, args.first + args.cases)
    commands = [name for name in args.command or materials.COMMANDS if name not in args.without]
    judged = fuzz(work / "inputs", work, numbers, args.seed, commands, again=bool(args.only))
    wrong = [found for found in judged if not found.is_right]
    for found in wrong:
        case = found.case
        print(
            f"{case.number} {found.verdict}: {case.command} < {case.file} ({case.kind}), exit {found.code}: "
            f"{found.last[:400]}"
        )
    print(table(judged))
    return 1 if wrong else 0


def _kill(args: argparse.Namespace, work: Path) -> int:
    from tools.faults.kills import kill, table

    made = kill(work / "inputs", work, args.kills, args.seed, args.command)
    print(table(made))
    return 1 if any(series.wrong for series in made) else 0


def _train(args: argparse.Namespace, work: Path) -> int:
    from tools.faults.kill_training import kill_training, table

    made = kill_training(work / "inputs", work, args.kills, args.seed, args.steps)
    print(table(made))
    return 1 if any(training.wrong for training in made) else 0


if __name__ == "__main__":
    sys.exit(main())
