"""`megatron-sfr status` on folders of runs in each state, and on a run that Megatron has made."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.cli.training.status import duration, read_status
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, write_checkpoint
from megatron_sfr.hf.megatron.tracker import TRACKER
from megatron_sfr.runtime.failures import recording
from megatron_sfr.storage.lock import hold
from megatron_sfr.train import LOG

SPEED = {"speed/tokens per second": 1234.0, "speed/step seconds": 0.5, "speed/seconds left": 120.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 10 steps after its fourth, with a checkpoint of step 3."""
    save = tmp_path / "run"
    write_checkpoint(save / "iter_0000003", [], {COMMON: {"iteration": 3}})
    (save / TRACKER).write_text("3")
    (save / "recipe.yaml").write_text("train_iters: 10\nglobal_batch_size: 4\n")
    rows = [
        {"step": n, "time": time.time() - 4 + n, "lm loss": 3.0 / n, "grad-norm": 1.0, **SPEED} for n in (1, 2, 3, 4)
    ]
    rows[2]["lm loss validation"] = 2.5
    (save / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "ti')
    return save


def write_log(run: Path, start: float, text: str) -> Path:
    """The log of a run that was started then."""
    log = run / "logs" / time.strftime(LOG, time.localtime(start))
    log.parent.mkdir()
    log.write_text(text)
    return log


def test_a_run_that_trains_names_its_process(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(run, inside=True):
        assert main(["status", str(run)]) == 0
    first, step, checkpoint, left, speed, losses, validation = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{run}: training, process ")
    assert step.startswith("step        4 of 10 (40%), logged ")
    assert checkpoint == f"checkpoint  {run}/iter_0000003, complete"
    assert left.startswith("time left   2 min 0 s, until 20") or left.startswith("time left   1 min 5")
    assert speed == "speed       1,234 tokens/s, 0.5 s a step"
    assert losses == "losses      lm loss 0.75, grad-norm 1"
    assert validation == "validation  at step 3: lm loss validation 2.5"


def test_a_lock_file_without_a_holder_is_that_of_a_killed_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / ".lock").write_text('{"process": 1, "host": "here", "since": "then"}')
    assert main(["status", "--json", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["process"], found["seconds_left"]) == ("failed", None, None)
    assert (found["step"], found["checkpoint_step"]) == (4, 3)
    assert found["error"] == "training failed: process 1 on here since then was killed; see the log of the job"
    assert found["losses"] == {"lm loss": 0.75, "grad-norm": 1.0}


def test_a_lock_file_without_locks_is_not_that_of_a_killed_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some parallel file systems; a run may train there."""
    (run / ".lock").write_text('{"process": 1, "host": "here", "since": "then"}')

    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert read_status(run, time.time()).state == "stopped"


def test_the_last_error_is_that_of_the_newest_log(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs/train-20261126-120000.log").write_text("ValueError: of an earlier start\n")
    (run / "logs/train-20261127-120000.log").write_text("OSError: [Errno 28] No space left on device: 'x'\n")
    found = read_status(run, time.time())
    assert found.state == "failed"
    assert found.error is not None
    assert found.error.startswith("training failed: the disk is full (x)")
    assert "train-20261127-120000.log" in found.error


def test_a_failure_that_a_rank_recorded_needs_no_log(run: Path) -> None:
    for why in ("Connection closed by peer [::1]", "out of memory", "of another"):  # what explains the rest
        with suppress(RuntimeError), recording(run, first=False, started=0.0):
            raise RuntimeError(why)
    found = read_status(run, time.time())
    assert found.state == "failed"
    assert found.error is not None
    assert found.error.startswith("training failed: rank 0 on ")
    assert ": RuntimeError: out of memory; see" in found.error
    lines = (run / "failures.jsonl").read_text().splitlines()
    (run / "failures.jsonl").write_text("\n".join([lines[0][9:], "3", *lines]))
    assert read_status(run, time.time()).error == found.error, "lines that another node has cut"
    lost = lines[0].replace("Connection closed by peer", "remote process exited or there was a network error")
    (run / "failures.jsonl").write_text(lost + "\n")
    assert "lost its connection to a rank that had ended; see" in (read_status(run, time.time()).error or "")


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt(), None])
def test_a_run_that_is_stopped_after_a_failure_is_stopped(run: Path, end: BaseException | None) -> None:
    with suppress(RuntimeError), recording(run, first=False, started=0.0):
        raise RuntimeError("of the last start")
    with suppress(SystemExit, KeyboardInterrupt), recording(run, first=True, started=time.time()):
        with suppress(RuntimeError), recording(run, first=False, started=0.0):
            raise RuntimeError("of a rank that was refused")
        if end is not None:
            raise end
    assert (read_status(run, time.time()).state, read_status(run, time.time()).error) == ("stopped", None)
    with suppress(RuntimeError), recording(run, first=False, started=0.0):
        raise RuntimeError("of a rank that was ending")
    write_log(run, time.time() - 60, "RuntimeError: of a rank that was ending\n")
    lock = run / ".lock"
    lock.write_text("of a first rank that was killed while it ended")
    os.utime(lock, (0, time.time() - 60))
    assert (read_status(run, time.time()).state, read_status(run, time.time()).error) == ("stopped", None)


def test_a_run_that_is_resumed_after_a_stop_fails(run: Path) -> None:
    """Before its first rank has taken the lock, while it holds it, and after."""
    with recording(run, first=True, started=time.time()):
        pass
    (run / ".lock").write_text('{"process": 1, "host": "here", "since": "then"}')
    os.utime(run / ".lock", (0, time.time() + 60))
    assert "process 1 on here since then was killed" in (read_status(run, time.time()).error or "")
    log = write_log(run, time.time() + 60, "ImportError: no libcudnn\n")
    assert "ImportError: no libcudnn" in (read_status(run, time.time()).error or "")
    log.unlink()
    for first in (False, True):
        with suppress(RuntimeError), recording(run, first=first, started=time.time()):
            raise RuntimeError(f"first: {first}")
        assert f"first: {first};" in (read_status(run, time.time()).error or "")


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt(), None])
def test_a_run_ends_as_it_does_where_its_end_cannot_be_written(run: Path, end: BaseException | None) -> None:
    (run / "failures.jsonl").mkdir()
    raised = None
    try:
        with recording(run, first=True, started=time.time()):
            if end is not None:
                raise end
    except BaseException as error:
        raised = error
    assert raised is end


def test_the_first_rank_keeps_what_another_one_recorded_since_it_started(run: Path) -> None:
    with suppress(RuntimeError), recording(run, first=False, started=0.0):
        raise RuntimeError("no GPU")
    for started, kept in ((time.time() - 60, True), (time.time() + 60, False)):
        with suppress(RuntimeError), recording(run, first=True, started=started):
            raise RuntimeError("stopped by the agent")
        assert ("no GPU" in (read_status(run, time.time()).error or "")) is kept


@pytest.mark.parametrize("end", [ValueError("no data"), KeyboardInterrupt()])
def test_a_run_that_ends_before_it_begins_leaves_no_folder(tmp_path: Path, end: BaseException) -> None:
    new = tmp_path / "new"
    with (
        pytest.raises(type(end)),
        hold(new, inside=True),
        recording(new, first=True, started=time.time()),
    ):
        raise end
    assert not new.exists()


def test_a_finished_run_and_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(run / "iter_0000010", [], {COMMON: {"iteration": 10}})
    (run / TRACKER).write_text("10")
    assert read_status(run, time.time()).state == "finished"
    (run / "iter_0000010/.metadata").write_bytes(b"\x80")
    assert main(["status", str(run)]) == 0
    assert "iter_0000003 is used, the newest complete checkpoint" in capsys.readouterr().out


def test_another_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "(no recipe.yaml, " in capsys.readouterr().err


def test_neither_torch_nor_megatron_is_imported(run: Path) -> None:
    program = (
        "import sys; from megatron_sfr.cli import main;"
        "sys.exit(main(sys.argv[1:]) or len({'torch', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, "status", str(run)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stopped" in done.stdout


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
