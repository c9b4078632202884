"""A run that is stopped or killed loses at most its current step or save, and prints how to resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from tests import warm
from tests.warm import ROOT

from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import PP2
from .tiny import write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.recovery]
FOREVER = 100_000
PATIENCE_S = 600  # a run that hangs never ends; one on a busy machine may need minutes to start


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Path:
    warm.server()  # now, or a run waits for it
    path = tmp_path_factory.mktemp("interruption") / "tiny.yaml"
    return write_recipe(path, runs.prepared, train_iters=FOREVER, num_workers=2)


@contextmanager
def started(recipe: Path, save: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """`megatron-sfr train` with two ranks; what is left of it at the end is killed."""
    command = [sys.executable, "-m", "megatron_sfr.cli", "train", str(recipe), "--nproc", "2", "--save", str(save)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([*command, *PP2, *flags], env=environment, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()  # its processes end with it


def in_warm_ranks(ranks: int, recipe: Path, save: Path, *flags: str) -> subprocess.CompletedProcess:
    """The same training without launcher and torchrun."""
    return warm.run("-m", "megatron_sfr.train", "--recipe", str(recipe), "--save", str(save), *flags, ranks=ranks)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.05)


def steps(save: Path) -> int:
    return len(read_metrics(save)) if (save / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_complete_checkpoint(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    with started(recipe, tmp_path / "run", "--save-interval", "2") as process:
        wait_for(lambda: steps(tmp_path / "run") >= 3, process)
        process.send_signal(number)
        output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    assert "the same command resumes" in output
    checkpoint = find_checkpoint(tmp_path / "run")
    assert "flow_head.net.output.weight" in read_checkpoint(checkpoint)
    assert int(checkpoint.name.removeprefix("iter_")) == read_metrics(tmp_path / "run")[-1]["step"]


def test_kill_9_during_a_save_loses_at_most_that_save(recipe: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    with started(recipe, save, "--save-interval", "1") as process:
        wait_for(lambda: (save / "iter_0000003").is_dir(), process)  # made first, filled and marked later
        second = in_warm_ranks(1, recipe, save)  # refused while the first rank of the first run holds the folder
        assert second.returncode == 2, second.stderr
        assert f"{save} is being written by process" in second.stderr
        for child in psutil.Process(process.pid).children(recursive=True):  # torchrun and its workers, not the launcher
            child.kill()
        output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 2, output
    assert "training failed" in output
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2
    assert read_checkpoint(find_checkpoint(save))
    newest = int(max(save.glob("iter_*/metadata.json")).parent.name.removeprefix("iter_"))  # its tracker may be older
    (save / "latest_checkpointed_iteration.txt").write_text("")  # as a kill of upstream's own write left it
    with (save / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": newest + 1, "time": 1.0, "lm loss": 1.0}) + '\n{"step": ')  # and a line cut off
    again = in_warm_ranks(2, recipe, save, *PP2, "--exit-interval", "1")
    assert again.returncode == 0, again.stderr
    assert f"is empty: iter_{newest:07d} is used, the newest complete checkpoint" in again.stdout
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(newest + 1)
    assert [row["step"] for row in read_metrics(save)] == list(range(1, newest + 2))
    assert not list(save.glob(".*lock"))


def test_a_restart_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    limit = ["--train-iters", "20", "--save-interval", "5"]
    with started(recipe, tmp_path / "killed", "--max-restarts", "1", *limit) as process:
        wait_for(lambda: steps(tmp_path / "killed") >= 7, process)
        children = psutil.Process(process.pid).children(recursive=True)
        next(child for child in children if child.cmdline()[1:4] == ["-u", "-m", "megatron_sfr.train"]).kill()
        output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    resumed = [row["step"] for row in read_metrics(tmp_path / "killed")]
    assert resumed == list(range(1, 21))
    straight = in_warm_ranks(2, recipe, tmp_path / "straight", *PP2, *limit)
    assert straight.returncode == 0, straight.stderr
    expected, actual = (read_checkpoint(find_checkpoint(tmp_path / name)) for name in ("straight", "killed"))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []


def test_a_failure_is_one_line_with_a_remedy(recipe: Path, tmp_path: Path) -> None:
    with started(recipe, tmp_path / "run", "--train-data-path", str(tmp_path / "absent")) as process:
        output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("megatron-sfr train: error:")
    assert str(tmp_path / "absent") in last
    assert "Traceback" not in output
