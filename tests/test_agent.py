"""The exit codes of `python -m megatron_sfr.agent`, which launch/slurm.sbatch reads. Ranks are one-line programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.recovery
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(2)", 2),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 128 + 15),
    ],
    ids=["finished", "user-error", "killed", "stopped"],
)
def test_the_exit_code_tells_how_the_run_ended(program: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "megatron_sfr.agent", "--standalone", "--nproc-per-node", "1", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_ranks_meet_at_the_nodes_name_under_slurm(tmp_path: Path) -> None:
    """Not at the host's own name: other nodes may not resolve it."""
    script = tmp_path / "rank.py"
    script.write_text("import os; print(os.environ['MASTER_ADDR'])", encoding="utf-8")
    command = [sys.executable, "-m", "megatron_sfr.agent", "--nnodes", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", "1", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "127.0.0.2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.2"
