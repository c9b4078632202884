"""Scores replies to tasks with a checker: pass@k, the best of k by a score, and the majority, with their intervals."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_sfr.evaluation.code.best_of_k import best_of_k, majority_at_k
from megatron_sfr.evaluation.code.exact_answers import final_answer
from megatron_sfr.evaluation.code.pass_at_k import pass_at_k
from megatron_sfr.evaluation.code.sandbox import Isolation, Limits, run_program
from megatron_sfr.evaluation.code.tasks import Task, agrees
from megatron_sfr.evaluation.compare.tables import markdown_table
from megatron_sfr.evaluation.generate.sampling import setting_of
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.user_files import cut, is_finite, parse_json, shown

TEXT = ("completion", "solution", "text")
"""Fields of a reply: of HumanEval, of EvalPlus, of `generate`."""
_REPLY = '{"task_id": "...", "completion": "..."}'
Setting = tuple[str, float]  # model, temperature
Judged = tuple["Reply", str]  # with its verdict


@dataclass(frozen=True)
class Reply:
    """A reply to a task, with its model and temperature."""

    setting: Setting
    task: str
    text: str
    scores: Mapping[str, float]
    """By which the best of k is chosen: utility (yours), logprob (the mean per token), where the record has them."""


@dataclass(frozen=True)
class Passes:
    """pass@k for k = 1, 2, ... of one model at one temperature, the outcomes of its replies, and each task's counts."""

    model: str
    temperature: float
    pass_at: list[Estimate]
    outcomes: dict[str, int]
    tasks: dict[str, tuple[int, int]]
    """Task: replies, passed."""
    selected: dict[str, list[Estimate]]
    """For k = 1, 2, ...: `best by utility`, `best by logprob`, `majority`, as far as the replies and tasks allow."""


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
            given = fields.get("task_id")
            name = by_prompt.get(str(fields.get("question")).strip()) if given is None else str(given)
            text = next((fields[name] for name in TEXT if fields.get(name) is not None), None)
            if name not in names or not isinstance(text, str):
                raise ValueError(
                    f"not a reply to a task; write {_REPLY}, or ask the prompts that --write-prompts gives"
                )
            model, temperature = setting_of(fields)
            setting = model or "model", 1.0 if temperature is None else float(temperature)
            replies.append(Reply(setting, name, text, _scores(fields)))
        except ValueError as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
    if not replies:
        raise ValueError(f"{path} has no replies")
    return replies


def _scores(fields: Mapping[str, Any]) -> dict[str, float]:
    """Raises ValueError for a utility that is not a number."""
    utility, logprob, tokens = (fields.get(name) for name in ("utility", "logprob", "tokens"))
    found = {}
    if utility is not None:
        if not is_finite(utility):
            raise ValueError(f"the utility is {shown(utility)}; write a number, or leave the field out")
        found["utility"] = float(utility)
    if is_finite(logprob) and is_finite(tokens) and tokens > 0:
        found["logprob"] = logprob / tokens
    return found


def verdict_of(task: Task, reply: str, limits: Limits, isolation: Isolation) -> str:
    """`passed`, `wrong answer`, `no answer`, or how the first failed program ended. Anything unclear is a failure."""
    if task.answer is not None:
        answer = final_answer(reply)
        return "no answer" if answer is None else "passed" if answer == task.answer else "wrong answer"
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
    found: dict[Setting, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    for reply, outcome in zip(replies, verdicts, strict=True):
        found[reply.setting][reply.task].append((reply, outcome))
    return [_passes(setting, by_task, by_name) for setting, by_task in found.items()]


def _passes(setting: Setting, by_task: Mapping[str, Sequence[Judged]], tasks: Mapping[str, Task]) -> Passes:
    verdicts = {name: [outcome for _, outcome in rows] for name, rows in by_task.items()}
    counts = {name: (len(row), row.count("passed")) for name, row in verdicts.items()}
    outcomes = Counter(outcome for row in verdicts.values() for outcome in row)
    curves = {"pass": [pass_at_k(n, c) for n, c in counts.values()]}
    for by in ("utility", "logprob"):
        if all(by in reply.scores for rows in by_task.values() for reply, _ in rows):
            curves[f"best by {by}"] = [
                best_of_k([reply.scores[by] for reply, _ in rows], [outcome == "passed" for _, outcome in rows])
                for rows in by_task.values()
            ]
    right = {name: answer for name in by_task if (answer := tasks[name].answer) is not None}
    if len(right) == len(by_task):
        curves["majority"] = [
            majority_at_k([final_answer(reply.text) for reply, _ in rows], right[name])
            for name, rows in by_task.items()
        ]
    largest = min(n for n, _ in counts.values())  # k beyond a task's replies has no unbiased estimate
    found = {
        name: [estimate(column) for column in np.stack([row[:largest] for row in rows]).T]
        for name, rows in curves.items()
    }
    return Passes(*setting, found.pop("pass"), dict(outcomes.most_common()), counts, found)


def as_markdown(scored: Sequence[Passes], notes: Sequence[str]) -> str:
    """pass@1, 2, 5, 10, 20, 50, 100 ... up to the number of replies, and the outcomes of the replies."""
    largest = min(len(passes.pass_at) for passes in scored)
    columns = [k for power in range(6) for k in (10**power, 2 * 10**power, 5 * 10**power) if k < largest] + [largest]
    endings = sorted({name for passes in scored for name in passes.outcomes})
    table = [["model", "temperature", "tasks", *(f"pass@{k}" for k in columns), *endings]]
    for passes in scored:
        numbers = [str(passes.pass_at[k - 1]) for k in columns]
        counts = [str(passes.outcomes.get(name, 0)) for name in endings]
        table.append([passes.model, f"{passes.temperature:g}", str(len(passes.tasks)), *numbers, *counts])
    lines = ["# pass@k", "", *markdown_table(table)]
    for name in dict.fromkeys(name for passes in scored for name in passes.selected):
        rows = [
            [passes.model, f"{passes.temperature:g}", *(str(passes.selected[name][k - 1]) for k in columns)]
            for passes in scored
            if name in passes.selected
        ]
        lines += ["", f"## {name} of k", "", *markdown_table([["model", "temperature", *map(str, columns)], *rows])]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def as_json(scored: Sequence[Passes], notes: Sequence[str]) -> str:
    content = {"notes": notes, "scores": [asdict(passes) for passes in scored]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
