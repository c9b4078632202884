"""The launch scripts: what they would run, what they refuse, and two real trainings that they start.

Slurm itself is not here: a stand-in for `srun` starts both nodes' agents on this machine, so the rendezvous, the
hand-over of SIGTERM and the last checkpoint are real; the #SBATCH lines and real nodes are not exercised.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.tiny import write_prepared, write_recipe

ROOT = Path(__file__).resolve().parents[2]
LOCAL, SLURM = "launch/local.sh", "launch/slurm.sbatch"
RECIPE = "examples/qwen3_32b_personas/recipe.yaml"
SRUN = """#!/usr/bin/env bash
# Starts the command once for each of two nodes and passes SIGTERM on, as Slurm does with --signal=TERM.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
until wait $first $second; (($? <= 128)) || ! kill -0 $first 2>/dev/null; do :; done
wait
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NPROC"))}
    return kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def bash(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *command], cwd=ROOT, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.parametrize("script", [LOCAL, SLURM])
def test_the_shell_reads_the_script(script: str) -> None:
    assert bash("-n", script).stderr == ""


def test_local_prints_the_command_with_its_flags_quoted() -> None:
    done = bash(LOCAL, "--dry-run", RECIPE, "--save", "runs/a b", "--train-iters", "5", NPROC="4")
    assert shlex.split(done.stdout) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("--max-restarts", "0", "--shutdown-timeout", "600", "-m", "megatron_sfr.train", "--recipe", RECIPE),
        *("--exit-signal-handler", "--save", "runs/a b", "--train-iters", "5"),
    ]


def test_slurm_prints_the_command_outside_of_a_job() -> None:
    command = shlex.split(bash(SLURM, "--dry-run", RECIPE, "--train-iters", "5").stdout)
    assert command[:2] == ["srun", "--ntasks-per-node=1"]
    assert command[command.index("--rdzv-endpoint") + 1] == "FIRST_NODE:29500"
    assert command[command.index("--nproc-per-node") + 1] == "8"
    recipe = command.index("--recipe")
    assert command[recipe - 2 :] == [
        *("-m", "megatron_sfr.train", "--recipe", RECIPE, "--exit-signal-handler", "--train-iters", "5")
    ]


def test_the_grace_ends_before_slurm_kills() -> None:
    text = (ROOT / SLURM).read_text()
    warned = int(text.partition("--signal=TERM@")[2].split()[0])
    assert int(text.partition("GRACE_S=${GRACE_S:-")[2].partition("}")[0]) < warned


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((LOCAL,), "usage: launch/local.sh"),
        ((LOCAL, "absent.yaml"), "absent.yaml: no such recipe"),
        ((SLURM, "absent.yaml"), "absent.yaml: no such recipe"),
        ((SLURM, RECIPE), "this is no Slurm job: start it with sbatch"),
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


@pytest.mark.distributed
def test_local_trains(prepared: Path, tmp_path: Path) -> None:
    layout = {"pipeline_model_parallel_size": 2, "save": str(tmp_path / "run"), "save_interval": 2, "train_iters": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, **layout)
    done = bash(LOCAL, str(recipe), "--log-interval", "1", NPROC="2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text().strip() == "2"


def stop_at_the_first_step(command: list[str], variables: dict[str, str], save: Path, log: Path) -> None:
    """Starts a training, sends SIGTERM once it logs steps, and waits for its end."""
    with log.open("w") as sink:
        job = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=sink, stderr=sink, start_new_session=True)
    try:
        metrics = save / "metrics.jsonl"
        while not (metrics.exists() and "lm loss" in metrics.read_text()):  # before, handlers may not be in place
            assert job.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)


@pytest.mark.distributed
def test_two_nodes_meet_and_leave_a_checkpoint_at_the_time_limit(prepared: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    layout = {"pipeline_model_parallel_size": 2, "save": str(save), "save_interval": 10**6, "train_iters": 10**6}
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
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "NPROC": "1", "PORT": port, "MAX_RESTARTS": "0"}
    stop_at_the_first_step(["bash", SLURM, str(recipe)], environment(**slurm, **path), save, tmp_path / "log")
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < step < 10**6
    assert (save / f"iter_{step:07d}/metadata.json").exists()
