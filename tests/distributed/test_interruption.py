"""A run that is stopped or killed loses at most the step or the save it was in, and says where to go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from tests.warm import ROOT

from .launch import read_checkpoint, read_metrics
from .tiny import write_prepared, write_recipe

pytestmark = pytest.mark.distributed
FOREVER = 100_000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    return write_recipe(folder / "tiny.yaml", write_prepared(folder / "data"), train_iters=FOREVER, num_workers=2)


def start(recipe: Path, save: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_sfr.cli", "train", str(recipe), "--nproc", "2", "--save", str(save)]
    parallel = ["--pipeline-model-parallel-size", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *parallel, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.05)


def steps(save: Path) -> int:
    return len(read_metrics(save)) if (save / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_whole_checkpoint(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(recipe, tmp_path / "run", "--save-interval", "2")
    # torchrun signals all processes of a rank: upstream's manager, which the first save starts, must not end.
    wait_for(lambda: steps(tmp_path / "run") >= 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    assert "the same command resumes" in output
    checkpoint = find_checkpoint(tmp_path / "run")
    assert "flow_head.net.output.weight" in read_checkpoint(checkpoint)
    assert int(checkpoint.name.removeprefix("iter_")) == read_metrics(tmp_path / "run")[-1]["step"]


def test_kill_9_during_a_save_loses_at_most_that_save(recipe: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    process = start(recipe, save, "--save-interval", "1")
    wait_for(lambda: (save / "iter_0000003").is_dir(), process)  # made first, filled and marked later
    second = start(recipe, save)  # refused while the first rank of the first run holds the folder
    refused = second.communicate(timeout=120)[0]
    assert second.returncode == 2, refused
    assert f"{save} is being written by process" in refused
    for child in psutil.Process(process.pid).children(recursive=True):  # torchrun and its workers, not the launcher
        child.kill()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, output
    assert "training failed" in output
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2
    assert read_checkpoint(find_checkpoint(save))
    newest = int(max(save.glob("iter_*/metadata.json")).parent.name.removeprefix("iter_"))  # its tracker may be older
    (save / "latest_checkpointed_iteration.txt").write_text("")  # as a kill of upstream's own write left it
    with (save / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": newest + 1, "time": 1.0, "lm loss": 1.0}) + '\n{"step": ')  # and a line cut off
    again = start(recipe, save, "--exit-interval", "1")
    output = again.communicate(timeout=180)[0]
    assert again.returncode == 0, output
    assert f"is empty: iter_{newest:07d} is used, the newest complete checkpoint" in output
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(newest + 1)
    assert [row["step"] for row in read_metrics(save)] == list(range(1, newest + 2))
    assert not list(save.glob(".*lock"))


def test_a_restart_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    steps_to_do = 60
    limit = ["--train-iters", str(steps_to_do), "--save-interval", "5"]
    process = start(recipe, tmp_path / "killed", "--max-restarts", "1", *limit)
    wait_for(lambda: (tmp_path / "killed/iter_0000005").is_dir() and steps(tmp_path / "killed") >= 7, process)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.cmdline()[1:4] == ["-u", "-m", "megatron_sfr.train"]).kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    straight = start(recipe, tmp_path / "straight", *limit)
    output = straight.communicate(timeout=300)[0]
    assert straight.returncode == 0, output
    expected, actual = (read_checkpoint(find_checkpoint(tmp_path / name)) for name in ("straight", "killed"))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []


def test_a_failure_is_one_line_that_says_what_to_do(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "run", "--train-data-path", str(tmp_path / "absent"))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("megatron-sfr train: error:")
    assert str(tmp_path / "absent") in last
    assert "Traceback" not in output
