"""The check of a GPU: time limits, logs, dependencies and comparisons, with small real processes; and its plan."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools.gpu_check.data import CONVERSATIONS, prepare_conversations
from tools.gpu_check.plan import TE, Machine, plan
from tools.gpu_check.steps import Comparison, Step, compare, markdown, run, run_all


def python(name: str, code: str, limit_s: float = 60, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s, needs)


def write_metrics(path: Path, lm: list[float], sfr: list[float] = ()) -> Path:
    rows = [{"lm loss": x} for x in lm] + [{"sfr loss": x} for x in sfr] + [{"other": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_step_past_its_limit_is_killed_with_what_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    result = run(python("hangs", code, limit_s=2), tmp_path)
    assert (result.mark, result.text) == ("FAIL", "killed after its limit of 2 s")
    time.sleep(0.5)
    alive.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not alive.exists()


def test_a_failure_names_its_error_and_stops_only_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = [
        python("first", "raise ValueError('no such kernel')"),
        python("second", "print('never')", needs=("first",)),
        python("third", "print('a'); print('b'); print('c')"),
        replace(python("fourth", ""), why_not="no GPU"),
    ]
    results = run_all([replace(step, lines=2) for step in steps], tmp_path / "logs")
    assert [(r.mark, r.text) for r in results] == [
        ("FAIL", "exit code 1: ValueError: no such kernel"),
        ("skipped", "needs first"),
        ("ok", "b\nc"),
        ("skipped", "no GPU"),
    ]
    assert "Traceback" in (tmp_path / "logs" / "first.log").read_text()
    shown = capsys.readouterr().out
    assert shown.index("FAIL") < shown.index("skipped") < shown.index("ok ")
    page = markdown("Check", ["- device: none"], results)
    assert "| FAIL | first |" in page
    assert "## third\n\n```\nb\nc\n```" in page


def test_words_of_a_command_come_from_an_earlier_step(tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    values.write_text('{"{rows}": 17}')
    step = Step("counts", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{rows}"), 60, values=values)
    assert run(step, tmp_path).text == "17"


@pytest.mark.parametrize(
    ("lm", "sfr", "tolerance", "mark", "text"),
    [
        ([2.0, 1.0], [3.0], 0.0, "ok", "differ by lm loss 0, sfr loss 0; allowed 0"),
        ([2.0, 1.01], [3.0], 0.02, "ok", "lm loss 0.01"),
        ([2.0, 1.01], [3.0], 0.001, "FAIL", "lm loss 0.01"),
        ([2.0, float("nan")], [3.0], 1.0, "FAIL", "lm loss inf"),
        ([2.0], [3.0], 1.0, "FAIL", "lm loss: 1 steps instead of 2"),
        ([2.0, 1.0], [], 1.0, "FAIL", "sfr loss: 0 steps instead of 1"),
        ([], [], 1.0, "skipped", "a has no losses"),
    ],
)
def test_losses_are_compared_step_by_step(
    lm: list[float], sfr: list[float], tolerance: float, mark: str, text: str, tmp_path: Path
) -> None:
    metrics = {
        "a": write_metrics(tmp_path / "a", lm, sfr),
        "b": write_metrics(tmp_path / "b", [2.0, 1.0], [3.0]),
    }
    result = compare(Comparison("a", "b", tolerance), metrics)
    assert result.mark == mark
    assert text in result.text


def test_only_the_first_step_may_be_compared(tmp_path: Path) -> None:
    metrics = {"a": write_metrics(tmp_path / "a", [2.0]), "b": write_metrics(tmp_path / "b", [2.0, 1.0])}
    assert compare(Comparison("a", "b", 0.0, first_step_only=True), metrics).mark == "ok"


def test_without_transformer_engine_its_steps_are_skipped_and_the_others_run(tmp_path: Path) -> None:
    absent = "Transformer Engine is not installed"
    steps = {p.name: p for p in plan(Machine(tmp_path, False, "", absent)) if isinstance(p, Step)}
    assert {name for name, step in steps.items() if step.why_not == absent} == {
        *("te_ce", "te_bf16", "te_fp8", "te_apart", "te_packed", "te_straight", "te_stopped", "te_resumed"),
        *("te_online", "bench_te", "bench_fp8"),
    }
    assert steps["cpu_sfr"].command[-2:] == ("--sfr-backend", "cpu")


def test_a_dry_run_has_the_same_trainings_without_what_needs_cuda(tmp_path: Path) -> None:
    dry, real = (plan(Machine(tmp_path, dry, "no GPU" if dry else "")) for dry in (True, False))
    assert [part.name for part in dry] == [part.name for part in real]
    trained = [part for part in dry if isinstance(part, Step) and part.metrics is not None]
    assert all("cpu" in step.command and not set(TE) & set(step.command) for step in trained)
    assert {part.name for part in dry if isinstance(part, Step) and part.why_not} == {"tests_gpu", "bench_fp8"}


def test_each_comparison_is_of_trainings_of_the_plan(tmp_path: Path) -> None:
    parts = plan(Machine(tmp_path, False))
    trained: set[str] = set()
    for part in parts:
        if isinstance(part, Step):
            trained |= {part.name} if part.metrics is not None else set()
        else:
            assert {part.actual, part.expected} <= trained


def test_the_conversations_fit_and_packing_puts_several_in_a_row(tmp_path: Path) -> None:
    data, sequences = prepare_conversations(tmp_path / "data")
    assert len(data) == CONVERSATIONS
    assert sequences <= CONVERSATIONS / 2
