"""What a step reports: terms on upstream's log line and in TensorBoard, and the same scalars as JSON lines."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def pair(total: Tensor | float, count: Tensor) -> Tensor:
    """[sum, count] of one microbatch, as upstream adds them over microbatches and data-parallel ranks; mean = ratio."""
    total = torch.as_tensor(total, dtype=torch.float32, device=count.device)
    return torch.stack([total.detach().view(()), count.float()])


class JsonLines:
    """Writes what upstream sends to its TensorBoard writer to a file too, one line a step; appends on resume."""

    def __init__(self, writer: Any, path: Path) -> None:
        self._add_scalar = writer.add_scalar
        self._path, self._step, self._row = path, 0, dict[str, float]()
        writer.add_scalar = self.add_scalar

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any) -> None:
        """TensorBoard's signature. Upstream's doubles over samples are left out: their axis is no step."""
        self._add_scalar(tag, scalar_value, global_step, *args, **kwargs)
        if tag.endswith(" vs samples"):
            return
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
