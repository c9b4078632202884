"""A step's metrics: losses on upstream's log line and in TensorBoard, and the same scalars as JSONL."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.runtime.replacements import Replacement, wrapper
from megatron_sfr.storage.atomic import replacing


def pair(total: Tensor | float, count: Tensor) -> Tensor:
    """[sum, count] of one microbatch. Upstream sums both over the global batch and logs their ratio."""
    total = torch.as_tensor(total, dtype=torch.float32, device=count.device)
    return torch.stack([total.detach().view(()), count.float()])


class JsonLines:
    """The scalars that upstream logs, as a JSONL file with one line per step.

    A resumed run truncates the file to the step that it resumes from, and appends.
    """

    def __init__(self, path: Path, resumed: Callable[[], int] = lambda: 0) -> None:
        """
        Args:
            resumed: returns the step that the run resumes from, 0 for a new run. Called at the first scalar, when no
                other run can be writing to the folder.
        """
        self._path, self._resumed = path, resumed
        self._step, self._record, self._fresh = 0, dict[str, float](), True
        self._offset, self._written = 0, True

    def add(self, tag: str, value: Any, step: int) -> None:
        """Adds a scalar. Omits upstream's ` vs samples` duplicates, whose x-axis is not the step."""
        if tag.endswith(" vs samples"):
            return
        if self._fresh:
            cut_back(self._path, self._resumed())
            self._fresh = False
        if step != self._step:
            self.flush()
            self._step, self._record, self._offset = step, {}, _size(self._path)
        self._record[tag] = float(value)
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


def replacements(lines: JsonLines) -> tuple[Replacement, ...]:
    """The names that are replaced so that `lines` gets TensorBoard's scalars and is complete in each checkpoint."""
    return (
        Replacement(
            "torch.utils.tensorboard.writer",
            "SummaryWriter.add_scalar",
            wrapper(lambda add_scalar: _to_both(add_scalar, lines)),
            "upstream sends its scalars to this method of its writer only, and tests the writer's class",
            ("self", "tag", "scalar_value", "global_step"),
        ),
        Replacement(
            "megatron.training.training",
            "save_checkpoint_and_time",
            wrapper(lambda save: _after_flush(save, lines)),
            "has no hook before a save; a process that is killed after it would lose the line of the step",
        ),
    )


def _to_both(add_scalar: Callable[..., None], lines: JsonLines) -> Callable[..., None]:
    """TensorBoard's add_scalar, which also adds the scalar to `lines`."""

    @functools.wraps(add_scalar)
    def add(writer: Any, tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any) -> None:
        add_scalar(writer, tag, scalar_value, global_step, *args, **kwargs)
        lines.add(tag, scalar_value, global_step)

    return add


def _after_flush(save: Callable[..., Any], lines: JsonLines) -> Callable[..., Any]:
    """Upstream's save, after the line of the step is written."""

    @functools.wraps(save)
    def flush_and_save(*args: Any, **kwargs: Any) -> Any:
        lines.flush()
        return save(*args, **kwargs)

    return flush_and_save


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
