"""Run replies to programming tasks in a sandbox, and report pass@k for every k with its interval.

Tasks are the JSONL of HumanEval, MBPP or LiveCodeBench; or of GSM8K, whose final answers are compared and voted on
without running anything. Write their prompts with --write-prompts, sample replies with `generate`, then score them with
--replies. Writes code.json, code.md and code.png, which shows pass@k (coverage@k) over k.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sfr.evaluation.code.tasks import Task

MOST_SECONDS, MOST_MIB = 86_400, 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="JSONL of programming tasks")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write-prompts", type=Path, metavar="FILE", help="write the prompts for generate, and stop")
    what.add_argument("--replies", type=Path, metavar="FILE", help="JSONL from generate, or of task_id and completion")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="programs run in parallel (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of one program (%(default)s)")
    parser.add_argument(
        "--memory", type=int, default=1024, metavar="MIB", help="memory limit of one program (%(default)s)"
    )
    parser.add_argument(
        "--isolation",
        choices=("auto", "namespaces", "audit"),
        default="auto",
        help="the sandbox: namespaces hide network and files; audit stops accidents only (auto: the best available)",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.evaluation.code.tasks import read_tasks
    from megatron_sfr.storage.atomic import replacing
    from megatron_sfr.storage.lock import hold

    tasks = read_tasks(args.tasks)
    if args.write_prompts is not None:
        if args.write_prompts.resolve() == args.tasks.resolve():
            raise ValueError(f"--write-prompts {args.write_prompts} is the file of --tasks; name another one")
        with replacing(args.write_prompts) as file:
            file.writelines(json.dumps({"prompt": task.prompt}, ensure_ascii=False) + "\n" for task in tasks)
        print(f"{args.write_prompts}: {len(tasks):,} prompts")
        return 0
    if args.output is None:
        raise ValueError("--replies needs --output DIR for the scores")
    with hold(args.output, inside=True):
        _score(args, tasks)
    return 0


def _score(args: argparse.Namespace, tasks: "list[Task]") -> None:
    """Scores the replies; writes and prints the result."""
    from megatron_sfr.evaluation.code.plot_coverage import draw_coverage
    from megatron_sfr.evaluation.code.sandbox import MIB, Limits, isolation_here
    from megatron_sfr.evaluation.code.score import as_json, as_markdown, read_replies, score
    from megatron_sfr.storage.atomic import replacing

    if args.processes < 1:
        raise ValueError(f"--processes {args.processes}: give at least 1")
    if not 0 < args.seconds <= MOST_SECONDS or not 1 <= args.memory <= MOST_MIB:
        raise ValueError(
            f"--seconds {args.seconds:g}, --memory {args.memory}: above 0, at most {MOST_SECONDS} and {MOST_MIB}"
        )
    limits = Limits(wall=args.seconds, cpu=max(1, round(args.seconds)), memory=args.memory * MIB)
    isolation = isolation_here() if args.isolation == "auto" else args.isolation
    scored = score(tasks, read_replies(args.replies, tasks), limits, isolation, args.processes)
    stops = "stops accidents, not attackers" if isolation == "audit" else "no network, none of this machine's files"
    notes = [
        "Intervals are 95 % bootstrap intervals over tasks; pass@k is unbiased, for k up to the replies of each task.",
    ]
    if any(task.answer is None for task in tasks):
        notes.insert(
            0,
            f"Sandbox: {isolation} ({stops}); each program is one process of at most {limits.wall:g} s, "
            f"{args.memory} MiB and {limits.threads} threads.",
        )
    draw_coverage(scored, args.output / "code.png")
    for name, text in (("code.json", as_json(scored, notes)), ("code.md", as_markdown(scored, notes))):
        with replacing(args.output / name) as file:
            file.write(text)
    print(as_markdown(scored, notes))
