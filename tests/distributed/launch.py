"""Trains in warm processes, and reads what runs left: metrics, and checkpoints as complete tensors of any layout."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.training.timing.step_speed import PREFIX
from tests import warm


def train(ranks: int, *flags: str) -> None:
    """Runs `megatron_sfr.train` with this many ranks; an AssertionError with the end of its output if it fails."""
    warm.run("-m", "megatron_sfr.train", *flags, ranks=ranks, check=True)


@lru_cache(maxsize=32)
def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, complete. Callers share them: do not change them."""
    checkpoint = Checkpoint(folder)
    sizes = {name: entry.size for name, entry in checkpoint.tensors.items()}
    return {name: checkpoint.read(name, [0] * len(size), size) for name, size in sizes.items()}


def read_metrics(save: Path) -> list[dict[str, Any]]:
    """The lines of SAVE/metrics.jsonl, without the speed, which differs between equal runs."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: x for name, x in record.items() if not name.startswith(PREFIX)} for record in records]
