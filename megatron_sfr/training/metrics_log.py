"""A step's metrics: losses on upstream's log line and in TensorBoard, and the same scalars as JSONL."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.training import training
from torch import Tensor

from megatron_sfr.storage.atomic import replacing


def pair(total: Tensor | float, count: Tensor) -> Tensor:
    """[sum, count] of one microbatch. Upstream sums both over the global batch and logs their ratio."""
    total = torch.as_tensor(total, dtype=torch.float32, device=count.device)
    return torch.stack([total.detach().view(()), count.float()])


class JsonLines:
    """Also writes the scalars sent to upstream's TensorBoard writer to a file, one line per step.

    A resumed run truncates the file to the step that it resumes from, and appends.

    Args:
        resumed: returns the step that the run resumes from, 0 for a new run. Called at the first scalar, when no other
            run can be writing to the folder.
    """

    def __init__(self, writer: Any, path: Path, resumed: Callable[[], int] = lambda: 0) -> None:
        self._add_scalar, self._resumed = writer.add_scalar, resumed
        self._path, self._step, self._record, self._fresh = path, 0, dict[str, float](), True
        self._offset, self._written = 0, True
        writer.add_scalar = self.add_scalar

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any) -> None:
        """Has TensorBoard's signature. Omits upstream's ` vs samples` duplicates, whose x-axis is not the step."""
        self._add_scalar(tag, scalar_value, global_step, *args, **kwargs)
        if tag.endswith(" vs samples"):
            return
        if self._fresh:
            cut_back(self._path, self._resumed())
            self._fresh = False
        if global_step != self._step:
            self.flush()
            self._step, self._record, self._offset = global_step, {}, _size(self._path)
        self._record[tag] = float(scalar_value)
        self._written = False

    def flush(self) -> None:
        """Writes the line of the current step. Later scalars of the same step replace it by a longer one."""
        if self._written:
            return
        line = json.dumps({"step": self._step, "time": round(time.time(), 3), **self._record}) + "\n"
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(self._offset)
            file.write(line.encode())
            file.truncate()
        self._written = True


@contextmanager
def flushed_before_saves(lines: JsonLines | None) -> Iterator[None]:
    """Within it, the line of a step is written before its checkpoint: a kill after the save does not lose it."""
    original = training.save_checkpoint_and_time

    def save(*args: Any, **kwargs: Any) -> Any:
        if lines is not None:
            lines.flush()
        return original(*args, **kwargs)

    training.save_checkpoint_and_time = save
    try:
        yield
    finally:
        training.save_checkpoint_and_time = original


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of later steps, and an incomplete last line. The file is replaced atomically."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        if all(_stays(line, step) for line in file):
            return
    with open(path, "rb") as file, replacing(path, "wb") as kept:
        kept.writelines(line for line in file if _stays(line, step))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stays(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return True  # not written by us: keep it
