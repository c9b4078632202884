"""launch/hosts.sh on two hosts, of which one is lost in the middle: the weights are those of an undisturbed run.

A host is a network namespace with an address, a link to the other host, and a separate /tmp; they share the folder of
the run. Needs root. A real network and GPUs are not exercised.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from tests import warm
from tests.distributed.launch import read_checkpoint, read_metrics
from tests.distributed.tiny import write_prepared, write_recipe
from tests.namespaces import ADDRESS, connect, has_namespaces, host, ip, kill_all

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.recovery,
    pytest.mark.skipif(not has_namespaces(), reason="needs root and ip netns"),
]


def start(name: str, namespace: str, recipe: Path, log: IO[str]) -> subprocess.Popen:
    """launch/hosts.sh on a host, with local temporary files."""
    variables = {"PYTHON": sys.executable, "HOSTS": "2", "NPROC": "1", "FIRST_HOST": ADDRESS["a"], "REJOIN_S": "600"}
    variables |= {"LOCAL_ADDR": ADDRESS[name], "INTERFACE": f"eth-{name}", "MAX_RESTARTS": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": "/dev/shm"}
    local = 'mount -t tmpfs none /dev/shm && exec bash launch/hosts.sh "$0"'
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, "unshare", "--mount", "bash", "-c", local, str(recipe)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def wait_for(condition, jobs: list[subprocess.Popen], log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert all(job.poll() is None for job in jobs), log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.1)


def test_a_lost_host_comes_back_and_the_weights_are_the_same(tmp_path: Path) -> None:
    """Its link goes down first, so that the other host hears nothing: a timeout of the collectives ends the wait."""
    prepared, save, log = write_prepared(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    shape = {"pipeline_model_parallel_size": 2, "train_iters": STEPS, "sfr_backend": "cpu"}
    recipe = write_recipe(
        *(tmp_path / "recipe.yaml", prepared),
        **shape,
        **{"save": str(save), "save_interval": 2, "distributed_timeout_minutes": 1, "num_workers": 2},
    )

    def step() -> int:
        return read_metrics(save)[-1]["step"] if (save / "metrics.jsonl").exists() and read_metrics(save) else 0

    with ExitStack() as stack:
        a, b = (stack.enter_context(host(name)) for name in "ab")
        sink = stack.enter_context(log.open("w"))
        connect(a, b)
        first, second = start("a", a, recipe, sink), start("b", b, recipe, sink)
        wait_for(lambda: step() >= 5, [first, second], log)
        ip("-netns", a, "link", "set", "eth-a", "down")
        kill_all(b)
        assert second.wait() == -signal.SIGKILL or second.returncode == 128 + signal.SIGKILL
        lost = step()
        assert lost < STEPS
        wait_for(lambda: "restart 1 of 1 from the last checkpoint" in log.read_text(), [first], log)
        ip("-netns", a, "link", "set", "eth-a", "up")
        second = start("b", b, recipe, sink)
        assert [first.wait(600), second.wait(600)] == [0, 0], log.read_text()[-4000:]
        assert not ip("netns", "pids", a).split() + ip("netns", "pids", b).split()

    straight = write_recipe(tmp_path / "straight.yaml", prepared, **shape, save=str(tmp_path / "straight"))
    warm.run("-m", "megatron_sfr.train", "--recipe", str(straight), ranks=2, check=True)
    expected, found = (read_checkpoint(find_checkpoint(folder)) for folder in (tmp_path / "straight", save))
    assert expected.keys() == found.keys()
    assert [name for name, x in expected.items() if not torch.equal(x, found[name])] == []
