"""The launch scripts: what they would run, what they refuse, and two real trainings in which a rank is killed.

A stand-in for `srun` starts both nodes' agents on this machine, so the rendezvous, the restart, SIGTERM and the last
checkpoint are real; the #SBATCH lines are not read. tests/slurm has a real Slurm, where one is installed.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.tiny import write_prepared, write_recipe

ROOT = Path(__file__).resolve().parents[2]
LOCAL, HOSTS, SLURM = "launch/local.sh", "launch/hosts.sh", "launch/slurm.sbatch"
RECIPE = "examples/qwen3_32b_personas/recipe.yaml"
SRUN = """#!/usr/bin/env bash
# Starts the command on two nodes and ends with the higher exit code. SIGTERM reaches the agents directly, as in Slurm.
while [[ $1 == --* ]]; do shift; done
trap : TERM
"$@" & agents=$!
"$@" & agents+=" $!"
highest=0
for agent in $agents; do
    while true; do code=0; wait $agent || code=$?; kill -0 $agent 2>/dev/null || break; done
    ((code > highest)) && highest=$code
done
exit $highest
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NPROC"))}
    return kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def bash(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *command], cwd=ROOT, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.parametrize("script", [LOCAL, HOSTS, SLURM])
def test_the_shell_reads_the_script(script: str) -> None:
    assert bash("-n", script).stderr == ""


def test_local_prints_the_command_with_its_flags_quoted() -> None:
    done = bash(LOCAL, "--dry-run", RECIPE, "--save", "runs/a b", "--train-iters", "5", NPROC="4")
    assert shlex.split(done.stdout) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("--max-restarts", "0", "-m", "megatron_sfr.train", "--recipe", RECIPE),
        *("--exit-signal-handler", "--save", "runs/a b", "--train-iters", "5"),
    ]


def test_hosts_prints_the_command_of_each_host() -> None:
    done = bash(HOSTS, "--dry-run", RECIPE, "--train-iters", "5", HOSTS="4", FIRST_HOST="10.0.0.1", NPROC="8")
    command = shlex.split(done.stdout)
    for option, value in {"--nnodes": "4", "--nproc-per-node": "8", "--rdzv-endpoint": "10.0.0.1:29500"}.items():
        assert command[command.index(option) + 1] == value
    assert command[command.index("megatron_sfr.train") + 1 :] == [
        *("--recipe", RECIPE, "--exit-signal-handler", "--train-iters", "5")
    ]


def test_slurm_prints_the_command_outside_of_a_job() -> None:
    command = shlex.split(bash(SLURM, "--dry-run", RECIPE, "--train-iters", "5").stdout)
    assert command[:2] == ["srun", "--ntasks-per-node=1"]
    assert command[command.index("--rdzv-endpoint") + 1] == "FIRST_NODE:29500"
    assert command[command.index("--nproc-per-node") + 1] == "8"
    assert command[command.index("--rdzv-id") + 1] == "JOB.0.0"
    recipe = command.index("--recipe")
    assert command[recipe - 2 :] == [
        *("-m", "megatron_sfr.train", "--recipe", RECIPE, "--exit-signal-handler", "--train-iters", "5")
    ]


def test_the_grace_ends_before_slurm_kills() -> None:
    text = (ROOT / SLURM).read_text()
    warned = int(text.partition("--signal=TERM@")[2].split()[0])
    assert int(text.partition("GRACE_S=${GRACE_S:-")[2].partition("}")[0]) < warned


@pytest.mark.parametrize("script", [LOCAL, HOSTS, SLURM])
def test_torchrun_of_torch_2_11_knows_all_options(script: str) -> None:
    command = shlex.split(bash(script, "--dry-run", RECIPE, NPROC="1").stdout)
    start = max(command.index(name) for name in ("torch.distributed.run", "megatron_sfr.agent") if name in command)
    options = {word for word in command[start : command.index("megatron_sfr.train")] if word.startswith("--")}
    assert options <= {
        *("--standalone", "--nnodes", "--nproc-per-node", "--max-restarts"),
        *("--rdzv-id", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-conf"),
    }


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((LOCAL,), "usage: launch/local.sh"),
        ((LOCAL, "absent.yaml"), "absent.yaml: no such recipe"),
        ((HOSTS,), "usage: launch/hosts.sh"),
        ((HOSTS, "absent.yaml"), "absent.yaml: no such recipe"),
        ((SLURM, "absent.yaml"), "absent.yaml: no such recipe"),
        ((SLURM, RECIPE), "this is not a Slurm job: start it with sbatch"),
    ],
)
def test_a_wrong_start_is_one_line(command: tuple[str, ...], reason: str) -> None:
    done = bash(*command, NPROC="1")
    assert done.returncode != 0
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("launch"))


@contextlib.contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Runs a launch script in a new session with its output in the log; kills what still runs at the end."""
    with log.open("w") as sink:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment(**variables), stdout=sink, stderr=sink, start_new_session=True
        )
    family = [psutil.Process(job.pid)]
    try:
        yield job
    finally:
        if job.poll() is None:
            family += family[0].children(recursive=True)
            for process in family:
                process.kill()
            job.wait()


def wait_for_step(step: int, save: Path, job: subprocess.Popen, log: Path) -> None:
    """Waits until SAVE/metrics.jsonl has the step; before the first, signal handlers may not be in place."""
    while not any(row["step"] >= step and "lm loss" in row for row in rows(save / "metrics.jsonl")):
        assert job.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)


def rows(metrics: Path) -> list[dict[str, Any]]:
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_a_rank(job: subprocess.Popen) -> None:
    children = psutil.Process(job.pid).children(recursive=True)
    next(child for child in children if child.cmdline()[1:4] == ["-u", "-m", "megatron_sfr.train"]).kill()


@pytest.mark.distributed
@pytest.mark.recovery
def test_local_restarts_after_a_rank_was_killed(prepared: Path, tmp_path: Path) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    layout = {"pipeline_model_parallel_size": 2, "save": str(save), "save_interval": 5, "train_iters": 20}
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, **layout)
    with started(["bash", LOCAL, str(recipe)], log, NPROC="2", MAX_RESTARTS="1") as job:
        wait_for_step(7, save, job, log)
        kill_a_rank(job)
        assert job.wait() == 0, log.read_text()[-3000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "20"


@pytest.mark.distributed
@pytest.mark.recovery
def test_two_nodes_restart_and_leave_a_checkpoint_at_the_time_limit(prepared: Path, tmp_path: Path) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    layout = {"pipeline_model_parallel_size": 2, "save": str(save), "save_interval": 5, "train_iters": 10**6}
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, **layout)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\necho localhost\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": port}
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "NPROC": "1", "PORT": port, "MAX_RESTARTS": "1"}
    with started(["bash", SLURM, str(recipe)], log, **slurm, **path) as job:
        wait_for_step(7, save, job, log)
        kill_a_rank(job)
        while "restart 1 of 1 from the last checkpoint" not in log.read_text():
            assert job.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        step = max(row["step"] for row in rows(save / "metrics.jsonl"))
        wait_for_step(step + 1, save, job, log)
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM, log.read_text()[-3000:]
    last = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert last > step
    assert (save / f"iter_{last:07d}/metadata.json").exists()
