"""Starts torchrun from a test, and reads what the runs left: checkpoints whole, whatever layout wrote them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
RUN_MANY = Path(__file__).with_name("run_many.py")


def torchrun(nproc: int, *command: str, check: bool = True, timeout: float = 1800) -> subprocess.CompletedProcess:
    """Runs `torchrun ... command` on gloo; a failure shows the end of its output."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run([*start, *command], env=environment, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raised = [line for line in done.stderr.splitlines() if line.startswith("[rank") or "error:" in line]
        raise AssertionError("\n".join([f"torchrun {command} failed:", *(raised[-30:] or [done.stderr[-6000:]])]))
    return done


def train_many(nproc: int, runs: list[list[str]], folder: Path) -> None:
    """Trains each argument list of `megatron_sfr.train` in turn, in one start of nproc processes."""
    listing = folder / f"runs-{nproc}.json"
    listing.write_text(json.dumps(runs), encoding="utf-8")
    for port in folder.glob(f"{listing.stem}.*.port"):  # of an earlier start
        port.unlink()
    torchrun(nproc, str(RUN_MANY), str(listing))


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, whole."""
    checkpoint = Checkpoint(folder)
    sizes = {name: entry.size for name, entry in checkpoint.tensors.items()}
    return {name: checkpoint.read(name, [0] * len(size), size) for name, size in sizes.items()}


def read_metrics(save: Path) -> list[dict[str, Any]]:
    """The rows of SAVE/metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
