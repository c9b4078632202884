"""Scores replies to programming tasks: runs every reply in the sandbox and computes pass@k with its interval."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_sfr.evaluation.code.pass_at_k import pass_at_k
from megatron_sfr.evaluation.code.sandbox import Isolation, Limits, run_program
from megatron_sfr.evaluation.code.tasks import Task, agrees
from megatron_sfr.evaluation.compare.tables import escaped
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.user_files import cut, parse_json, shown

_REPLY = '{"task_id": "...", "completion": "..."}'
Setting = tuple[str, float]  # model, temperature


@dataclass(frozen=True)
class Reply:
    """A reply to a task, with its model and temperature."""

    setting: Setting
    task: str
    text: str


@dataclass(frozen=True)
class Passes:
    """pass@k for k = 1, 2, ... of one model at one temperature, the outcomes of its replies, and each task's counts."""

    model: str
    temperature: float
    pass_at: list[Estimate]
    outcomes: dict[str, int]
    tasks: dict[str, tuple[int, int]]
    """Task: replies, passed."""


def read_replies(path: Path, tasks: Sequence[Task]) -> list[Reply]:
    """Replies from records of `generate`, matched by their question, or records of task_id and completion.

    Raises ValueError with the line of a wrong record.
    """
    by_prompt, names = {task.prompt.strip(): task.name for task in tasks}, {task.name for task in tasks}
    replies = []
    for record in read_records(path):
        try:
            fields = parse_json(record.text)
            if not isinstance(fields, dict):
                raise ValueError(f"{shown(fields)} is not a reply; write {_REPLY}")
            name = str(fields["task_id"]) if "task_id" in fields else by_prompt.get(str(fields.get("question")).strip())
            text = fields.get("completion", fields.get("text"))
            if name not in names or not isinstance(text, str):
                raise ValueError(
                    f"not a reply to a task; write {_REPLY}, or ask the prompts that --write-prompts gives"
                )
            replies.append(Reply(_setting(fields), name, text))
        except ValueError as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
    if not replies:
        raise ValueError(f"{path} has no replies")
    return replies


def _setting(fields: Mapping[str, Any]) -> Setting:
    """The model and temperature of a reply; null means missing."""
    model, temperature = fields.get("model"), fields.get("temperature")
    if not isinstance(model, str | None):
        raise ValueError(f"the model is {shown(model)}; write its name, or leave the field out")
    if temperature is None:
        return model or "model", 1.0
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"the temperature is {shown(temperature)}; write a number, or leave the field out")
    return model or "model", float(temperature)


def verdict_of(task: Task, reply: str, limits: Limits, isolation: Isolation) -> str:
    """`passed`, `wrong answer`, or how the first failed program ended. Anything unclear is a failure."""
    for program in task.programs(reply):
        to_the_end = program.expected is None
        outcome = run_program(
            program.source,
            stdin=program.stdin,
            name="solution" if to_the_end else "__main__",  # a main guard is part of a program, not of a function
            limits=limits,
            isolation=isolation,
            to_the_end=to_the_end,
        )
        if outcome.ending == "failed" and outcome.error.startswith("AssertionError"):
            return "wrong answer"
        if outcome.ending != "ended":
            return outcome.ending
        if program.expected is not None and not agrees(outcome.output, program.expected):
            return "wrong answer"
    return "passed"


def score(
    tasks: Sequence[Task], replies: Sequence[Reply], limits: Limits, isolation: Isolation, processes: int
) -> list[Passes]:
    """Runs every reply, `processes` at a time. Returns one entry per model and temperature.

    Raises ValueError if a task has no reply.
    """
    by_name = {task.name: task for task in tasks}
    for model, temperature in dict.fromkeys(reply.setting for reply in replies):
        answered = {reply.task for reply in replies if reply.setting == (model, temperature)}
        if missing := by_name.keys() - answered:
            raise ValueError(
                f"{cut(model)} at temperature {temperature:g} has no reply to {cut(min(missing))}; sample all tasks"
            )
    with ThreadPoolExecutor(processes) as pool, tqdm(total=len(replies), unit="reply", dynamic_ncols=True) as bar:

        def run(reply: Reply) -> str:
            found = verdict_of(by_name[reply.task], reply.text, limits, isolation)
            bar.update()
            return found

        verdicts = list(pool.map(run, replies))
    found: dict[Setting, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for reply, outcome in zip(replies, verdicts, strict=True):
        found[reply.setting][reply.task].append(outcome)
    return [_passes(setting, by_task) for setting, by_task in found.items()]


def _passes(setting: Setting, by_task: Mapping[str, Sequence[str]]) -> Passes:
    counts = {name: (len(row), row.count("passed")) for name, row in by_task.items()}
    largest = min(n for n, _ in counts.values())  # k beyond a task's replies has no unbiased estimate
    table = np.stack([pass_at_k(n, c)[:largest] for n, c in counts.values()])
    outcomes = Counter(outcome for row in by_task.values() for outcome in row)
    return Passes(*setting, [estimate(column) for column in table.T], dict(outcomes.most_common()), counts)


def as_markdown(scored: Sequence[Passes], notes: Sequence[str]) -> str:
    """pass@1, 2, 5, 10, 20, 50, 100 ... up to the number of replies, and the outcomes of the replies."""
    largest = min(len(passes.pass_at) for passes in scored)
    shown = [k for power in range(6) for k in (10**power, 2 * 10**power, 5 * 10**power) if k < largest] + [largest]
    endings = sorted({name for passes in scored for name in passes.outcomes})
    head = ["model", "temperature", "tasks", *(f"pass@{k}" for k in shown), *endings]
    lines = ["# pass@k", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for passes in scored:
        numbers = [str(passes.pass_at[k - 1]) for k in shown]
        counts = [str(passes.outcomes.get(name, 0)) for name in endings]
        row = [passes.model, f"{passes.temperature:g}", str(len(passes.tasks)), *numbers, *counts]
        lines.append(f"| {' | '.join(map(escaped, row))} |")
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def as_json(scored: Sequence[Passes], notes: Sequence[str]) -> str:
    content = {"notes": notes, "scores": [asdict(passes) for passes in scored]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
