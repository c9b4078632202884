"""What a step reports: terms on upstream's log line and in TensorBoard, and the same scalars as JSON lines."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.runtime.atomic import replacing


def pair(total: Tensor | float, count: Tensor) -> Tensor:
    """[sum, count] of one microbatch, as upstream adds them over microbatches and data-parallel ranks; mean = ratio."""
    total = torch.as_tensor(total, dtype=torch.float32, device=count.device)
    return torch.stack([total.detach().view(()), count.float()])


class JsonLines:
    """Writes what upstream sends to its TensorBoard writer to a file too, one line a step.

    A resumed run appends to the file, cut back to the step that it resumes from.

    Args:
        resumed: gives the step that the run resumes from, 0 for one that starts. Called at the first scalar, when it is
            certain that no other run writes to the folder.
    """

    def __init__(self, writer: Any, path: Path, resumed: Callable[[], int] = lambda: 0) -> None:
        self._add_scalar, self._resumed = writer.add_scalar, resumed
        self._path, self._step, self._row, self._fresh = path, 0, dict[str, float](), True
        writer.add_scalar = self.add_scalar

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any) -> None:
        """TensorBoard's signature. Upstream's doubles over samples are left out: their axis is no step."""
        self._add_scalar(tag, scalar_value, global_step, *args, **kwargs)
        if tag.endswith(" vs samples"):
            return
        if self._fresh:
            cut_back(self._path, self._resumed())
            self._fresh = False
        if global_step != self._step:
            self.flush()
            self._step = global_step
        self._row[tag] = float(scalar_value)

    def flush(self) -> None:
        """Writes the row in progress."""
        if self._row:
            line = json.dumps({"step": self._step, "time": round(time.time(), 3), **self._row})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._row = {}


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of later steps and a last line that a kill cut off. The file is replaced atomically."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        if all(_stays(line, step) for line in file):
            return
    with open(path, "rb") as file, replacing(path, "wb") as kept:
        kept.writelines(line for line in file if _stays(line, step))


def _stays(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return True  # not a line of ours: it stays as it is
