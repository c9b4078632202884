"""Steps of a check of a machine: each a command with a time limit and a log; a failure stops nothing else.

Knows nothing of training: what a step runs and what its losses should equal is in plan.py.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_sfr.runtime.lifetime import tied

Mark = Literal["ok", "FAIL", "skipped"]
TIMED_OUT = 124  # the exit code of timeout(1)


@dataclass(frozen=True)
class Step:
    """A command. `needs`: names of steps that must have passed; `why_not`: why it cannot run on this machine, or ''."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    metrics: Path | None = None
    """metrics.jsonl of a training, whose losses the table shows."""
    lines: int = 1
    """How many of the last lines of its output the table shows, where there are no metrics."""
    values: Path | None = None
    """JSON file of an earlier step, which maps words of the command, such as {packed}, to their values."""
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """The losses of two trainings, step by step; a loss that only the expected run has is a failure."""

    actual: str
    expected: str
    tolerance: float
    """Largest relative difference; 0: bit for bit."""
    first_step_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.actual} = {self.expected}"


@dataclass(frozen=True)
class Result:
    name: str
    mark: Mark
    seconds: float
    text: str


def run(step: Step, logs: Path, *, slow: float = 1.0) -> Result:
    """Runs a step. Past its limit the step and all that it started are killed."""
    log, began = logs / f"{step.name}.log", time.monotonic()
    values = json.loads(step.values.read_text(encoding="utf-8")) if step.values else {}
    command = [str(values.get(word, word)) for word in step.command]
    with log.open("w", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        process = subprocess.Popen(
            tied(command),
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | step.environment,
            start_new_session=True,
        )
        try:
            code = process.wait(slow * step.limit_s)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:  # also what a step has left behind
            _kill_group(process)
    seconds = time.monotonic() - began
    output = log.read_text(encoding="utf-8", errors="replace")
    if code == TIMED_OUT:
        return Result(step.name, "FAIL", seconds, f"killed after its limit of {slow * step.limit_s:.0f} s")
    if code != 0:
        return Result(step.name, "FAIL", seconds, f"exit code {code}: {last_error(output)}")
    if step.metrics is not None:
        return Result(step.name, "ok", seconds, _losses_text(step.metrics))
    return Result(step.name, "ok", seconds, "\n".join(output.strip().splitlines()[1:][-step.lines :]))


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_error(output: str) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [x for x in lines if ("Error" in x or "error:" in x) and "ChildFailedError" not in x]
    return (errors or lines or [""])[-1][:300]


def losses(metrics: Path) -> dict[str, list[float]]:
    """The losses of a training by name, one for each step; empty where there is no file."""
    found: dict[str, list[float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        record = json.loads(line)
        for name in ("lm loss", "sfr loss"):
            if name in record:
                found.setdefault(name, []).append(record[name])
    return found


def _losses_text(metrics: Path) -> str:
    found = losses(metrics)
    return "; ".join(f"{name} {' '.join(f'{x:.5f}' for x in values)}" for name, values in found.items())


def compare(comparison: Comparison, metrics: Mapping[str, Path]) -> Result:
    """Whether two trainings agree; skipped where either has left no losses."""
    actual, expected = (losses(metrics[name]) for name in (comparison.actual, comparison.expected))
    if not actual or not expected:
        absent = comparison.expected if actual else comparison.actual
        return Result(comparison.name, "skipped", 0, f"{absent} has no losses")
    last = 1 if comparison.first_step_only else None
    worst, texts = 0.0, []
    for name, values in expected.items():
        pairs = list(zip(actual.get(name, [])[:last], values[:last], strict=False))
        if len(actual.get(name, [])[:last]) != len(values[:last]):
            text = f"{name}: {len(actual.get(name, []))} steps instead of {len(values)}"
            return Result(comparison.name, "FAIL", 0, text)
        difference = max(relative_difference(a, b) for a, b in pairs)
        worst = max(worst, difference) if math.isfinite(difference) else math.inf
        texts.append(f"{name} {difference:.2g}")
    mark: Mark = "ok" if worst <= comparison.tolerance else "FAIL"
    return Result(comparison.name, mark, 0, f"differ by {', '.join(texts)}; allowed {comparison.tolerance:g}")


def relative_difference(actual: float, expected: float) -> float:
    """|a - b| / |b|; infinite where either is not a number."""
    if not (math.isfinite(actual) and math.isfinite(expected)):
        return math.inf
    return abs(actual - expected) / max(abs(expected), 1e-12)


def run_all(
    plan: Sequence[Step | Comparison], logs: Path, *, only: frozenset[str] = frozenset(), slow: float = 1.0
) -> list[Result]:
    """Runs a plan in order and prints each result as it comes. only: names of steps, empty for all."""
    logs.mkdir(parents=True, exist_ok=True)
    metrics = {part.name: part.metrics for part in plan if isinstance(part, Step) and part.metrics is not None}
    results: dict[str, Result] = {}
    for part in plan:
        if isinstance(part, Comparison):
            result = compare(part, metrics)
        elif only and part.name not in only:
            continue
        elif part.why_not:
            result = Result(part.name, "skipped", 0, part.why_not)
        elif missing := [x for x in part.needs if x in results and results[x].mark != "ok"]:
            result = Result(part.name, "skipped", 0, f"needs {', '.join(missing)}")
        else:
            result = run(part, logs, slow=slow)
        results[part.name] = result
        print(row(result), flush=True)
    return list(results.values())


def row(result: Result) -> str:
    first, *rest = result.text.splitlines() or [""]
    return "\n".join(
        [f"{result.mark:8}{result.name:34}{result.seconds:7.1f} s  {first}", *(" " * 53 + x for x in rest)]
    )


def markdown(title: str, about: Sequence[str], results: Sequence[Result]) -> str:
    """The whole report as one Markdown document."""
    lines = [f"# {title}", "", *about, "", "| result | step | s | |", "|---|---|---|---|"]
    for result in results:
        text = result.text if "\n" not in result.text else "see below"
        lines.append(f"| {result.mark} | {result.name} | {result.seconds:.1f} | {text.replace('|', '\\|')} |")
    for result in results:
        if "\n" in result.text:
            lines += ["", f"## {result.name}", "", "```", result.text, "```"]
    return "\n".join(lines) + "\n"
