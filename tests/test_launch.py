"""What the launcher knows before anything is started."""

import json
import os
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher.api import LaunchConfig

from megatron_sfr import cli, launch
from megatron_sfr.cli.training.status import read_status
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, write_checkpoint
from megatron_sfr.hf.megatron.tracker import CONFIG, TRACKER
from megatron_sfr.launch import SHUTDOWN_S, Run, _bar, _warnings, command, new_rows, read_run, variables
from megatron_sfr.storage.lock import hold
from megatron_sfr.train import WARNING
from megatron_sfr.training.metrics_log import cut_back

SIZES = "train-iters: 7\nmicro_batch_size: 2\nglobal_batch_size: 8\nseq_length: 16\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, SIZES + "save: here\n"), ["--train-iters", "9", "--lr", "1", "--save", "there"])
    assert (run.save, run.train_iters) == (Path("there"), 9)


@pytest.mark.parametrize(
    ("line", "flags"), [("", ["--skip-train"]), ("", ["--skip_train"]), ("skip_train: true\n", []), ("", [])]
)
def test_a_run_that_only_evaluates_is_known_by_any_spelling(tmp_path: Path, line: str, flags: list[str]) -> None:
    assert read_run(write(tmp_path, SIZES + "save: here\n" + line), flags).skips_training is bool(line or flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SIZES, "save is missing"),
        ("a: [", "not YAML"),
        ("- a\n", "not a YAML mapping"),
        (SIZES + "seq-length: 32\nsave: a", "seq_length and seq-length are one option, which is set in line 4"),
        (SIZES.replace("7", "[4]") + "save: a", r"recipe.yaml: train-iters: \[4\] is not one value; write text or a"),
        (SIZES.replace("7", "1.5") + "save: a", "recipe.yaml: argument --train-iters: invalid int value: '1.5'"),
        (SIZES.replace("7", "0") + "save: a", "recipe.yaml: train_iters = 0: give at least 1"),
        (
            SIZES + "save: 2026-13-45",
            r"recipe.yaml: a value cannot be read \(month must be in 1..12\); put text in quotes",
        ),
        (SIZES + "save: !!timestamp x", r"recipe.yaml: a value cannot be read \(AttributeError: "),
        (SIZES + "save: !!int x", r"recipe.yaml: a value cannot be read \(invalid literal"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(write(tmp_path, text), [])


@pytest.mark.parametrize("loss", ["lm loss", "kl-flow loss"])
def test_the_bar_moves_with_the_steps_of_either_task(tmp_path: Path, loss: str, capsys: pytest.CaptureFixture) -> None:
    bar = _bar(Run(tmp_path, 7), "train")
    next(bar)
    rows = [
        {"step": 1, "time": 0.0, loss: 2.0},
        {"step": 1, "time": 0.5, "entropy": 1.0},
        {"step": 2, "time": 1.0, loss: 0.5, "speed/tokens per second": 1234.5, "speed/MFU": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    next(bar)
    bar.close()  # type: ignore[attr-defined]
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "2/7" in shown
    assert f"{loss}=0.500" in shown
    assert "tokens/s=1,234, MFU=40%" in shown


def test_warnings_are_printed_at_the_first_step_and_each_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    log.write_text(f"backend: cpu\n{WARNING} the data are odd\n")
    tell = _warnings(log, "ce")
    bar = _bar(Run(tmp_path, 7), "ce", tell)
    next(bar)
    assert capsys.readouterr().out == ""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "lm loss": 2.0}\n')
    next(bar)
    bar.close()  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "ce: warning: the data are odd\n"
    log.write_text(f"{log.read_text()}{WARNING} the end is odd\n")
    tell()
    assert capsys.readouterr().out == "ce: warning: the end is odd\n"


def test_torchrun_waits_for_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an environment variable: torch 2.11's torchrun refuses --shutdown-timeout, which newer ones have."""
    (name,) = variables(max_restarts=0)
    assert not any("shutdown" in word for word in command(Path("recipe.yaml"), 1, []))
    monkeypatch.setenv(name, variables(0)[name])
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if hasattr(config, "shutdown_timeout"):
        assert config.shutdown_timeout == SHUTDOWN_S


def test_each_restart_has_a_new_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's handler of the rendezvous reads the variable; the default shares one store between attempts."""
    handler = DynamicRendezvousHandler.__new__(DynamicRendezvousHandler)
    assert handler.use_agent_store
    for name, value in variables(max_restarts=1).items():
        monkeypatch.setenv(name, value)
    assert not handler.use_agent_store


def test_dry_run_prints_the_torchrun_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write(tmp_path, SIZES + "save: here\n")
    assert cli.main(["train", str(recipe), "--nproc", "2", "--max-restarts", "3", "--dry-run", "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3" in printed
    assert printed.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ")
    assert printed.strip().endswith(f"-m megatron_sfr.train --recipe {recipe} --bf16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.yaml", "--nproc", "1"], "absent.yaml: no such recipe"),
        (["train", "absent.yaml", "--nproc", "0"], "at least one process"),
        (["train", "absent.yaml", "--max-restarts", "-1"], "give 0 or more"),
    ],
)
def test_wrong_calls_end_with_2_and_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe of 30 steps and the folder of its run, which has a checkpoint of step 30 and one of step 20."""
    save, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(f"save: {save}\ntrain_iters: 30\nmicro_batch_size: 2\nseq_length: 8\n", encoding="utf-8")
    for step in (20, 30):
        write_checkpoint(save / f"iter_{step:07d}", [], {COMMON: {"iteration": step}})
    (save / TRACKER).write_text("30", encoding="utf-8")
    return recipe, save


@pytest.mark.parametrize("tracker", ["30", "", None])
def test_a_run_that_has_all_its_steps_is_not_started_again(
    finished: tuple[Path, Path], tracker: str | None, capsys: pytest.CaptureFixture
) -> None:
    recipe, save = finished
    (save / TRACKER).unlink()
    if tracker is not None:
        (save / TRACKER).write_text(tracker, encoding="utf-8")
    assert cli.main(["train", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "has all 30 steps already" in printed
    assert ("iter_0000030 is used" in printed) == (tracker != "30")
    assert not (save / "logs").exists()
    assert cli.main(["train", str(recipe), "--train-iters", "25"]) == 0
    assert "has all 25 steps already (it has 30)" in capsys.readouterr().out


def test_a_run_whose_last_checkpoint_is_not_complete_is_started_again(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe, save = finished
    (save / "iter_0000030" / CONFIG).unlink()
    monkeypatch.setattr(launch, "command", lambda *_: ["false"])
    assert cli.main(["train", str(recipe)]) == 2
    printed = capsys.readouterr()
    assert "training failed: no process said why" in printed.err
    assert "which has no metadata.json" in printed.out
    assert "iter_0000020 is used" in printed.out
    assert "already" not in printed.out


def test_a_run_in_progress_is_not_started_a_second_time(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe, save = finished
    monkeypatch.setattr(launch, "LOCK_WAIT_S", 0.0)
    with hold(save, inside=True):
        assert cli.main(["train", str(recipe)]) == 2
    assert f"{save} is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not (save / ".lock").exists()


def test_a_run_that_is_stopped_before_its_first_rank_can_record_it_is_stopped(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, save = finished
    write(save, "train-iters: 40\n")
    starting = "echo SignalException: signal 15; touch $0/.lock; kill -INT $PPID; exec sleep 60"
    monkeypatch.setattr(launch, "command", lambda *_: ("sh", "-c", starting, str(save)))
    with pytest.raises(KeyboardInterrupt):
        launch.train(recipe, 1, ["--train-iters", "40"])
    assert read_status(save, time.time()).state == "stopped"


def test_the_bar_copes_with_metrics_that_are_cut_back(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    row = '{{"step": {}, "time": {}, "lm loss": 2.0}}\n'.format
    metrics.write_text("".join(row(step, 1.0) for step in range(1, 9)), encoding="utf-8")
    rows = new_rows(metrics)
    assert next(rows) == []
    cut_back(metrics, 5)
    assert next(rows) == []
    with metrics.open("a", encoding="utf-8") as file:
        file.write("".join(row(step, time.time() + 1) for step in range(6, 20)) + '{"step": 20')
    assert [row["step"] for row in next(rows)] == list(range(6, 20))
    with metrics.open("a", encoding="utf-8") as file:  # what no run has written must not end the one that is running
        file.write('\n[1]\n{"step": "x", "time": 1}\n\x00\n' + "[" * 10_000 + "\n" + row(21, time.time() + 1))
    assert [row["step"] for row in next(rows)] == [21]
    assert next(rows) == []
