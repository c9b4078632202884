"""A step's metrics: losses on upstream's log line and in TensorBoard, and the same scalars as JSONL."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, wrapper
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.user_files import parse_json
from megatron_sfr.training.tracking.mlflow_log import MLflowLog


class JsonLines:
    """The scalars that upstream logs, as a JSONL file with one line per step.

    A line is appended once its step is over, so that others can follow the file. Before each checkpoint the line of the
    current step is saved beside it (`metrics.pending.json`): a run that is killed after the checkpoint resumes with it.
    A resumed run truncates the file to the step that it resumes from, and appends.
    """

    def __init__(self, path: Path, resumed: Callable[[], int] = lambda: 0, mlflow: MLflowLog | None = None) -> None:
        """
        Args:
            resumed: returns the step that the run resumes from, 0 for a new run. Called at the first scalar, when no
                other run can be writing to the folder.
            mlflow: also gets each line when it is appended.
        """
        self._path, self._pending, self._resumed = path, path.with_name("metrics.pending.json"), resumed
        self._step, self._record, self._fresh = 0, dict[str, Any](), True
        self._mlflow = mlflow

    def add(self, tag: str, value: Any, step: int) -> None:
        """Adds a scalar. Omits upstream's ` vs samples` duplicates, whose x-axis is not the step."""
        if not tag.endswith(" vs samples"):
            self._of(step)[tag] = float(value)

    def add_table(self, tag: str, table: dict[str, dict[str, float]], step: int) -> None:
        """Adds an object of objects of numbers, such as the metrics by persona."""
        self._of(step)[tag] = table

    def _of(self, step: int) -> dict[str, Any]:
        """The record of a step; appends the record before it."""
        if self._fresh:
            self._resume()
        if step != self._step:
            self.flush()
            self._step = step
        return self._record

    def flush(self) -> None:
        """Appends the line of the current step, which is over."""
        if self._record:
            line = self._line()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._pending.unlink(missing_ok=True)
            if self._mlflow is not None:
                self._mlflow.add(line)
            self._record = {}

    def close(self, *, failed: bool = False) -> None:
        """Appends the last line, and ends the run in MLflow."""
        self.flush()
        if self._mlflow is not None:
            self._mlflow.close(failed=failed)

    def keep(self) -> None:
        """Saves the line of the current step, which may get more scalars, in a separate file."""
        if self._record:
            with replacing(self._pending) as file:
                file.write(json.dumps(self._line()) + "\n")

    def _line(self) -> dict[str, Any]:
        return {"step": self._step, "time": round(time.time(), 3), **self._record}

    def _resume(self) -> None:
        """Truncates the file to the step that the run resumes from, and appends a saved line that belongs there."""
        self._fresh, step = False, self._resumed()
        last = cut_back(self._path, step)
        if self._pending.exists():
            line = self._pending.read_bytes()
            if last < _step(line) <= step:
                with self._path.open("ab") as file:
                    file.write(line)
            self._pending.unlink()


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
            wrapper(lambda save: _after_keeping(save, lines)),
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


def _after_keeping(save: Callable[..., Any], lines: JsonLines) -> Callable[..., Any]:
    """Upstream's save, after the line of the step is kept."""

    @functools.wraps(save)
    def keep_and_save(*args: Any, **kwargs: Any) -> Any:
        lines.keep()
        return save(*args, **kwargs)

    return keep_and_save


def cut_back(path: Path, step: int) -> int:
    """Drops the lines of later steps, and an incomplete last line. The file is replaced atomically.

    Returns:
        The last step that the file has now; 0 without one.
    """
    if not path.exists():
        return 0
    last, complete = 0, True
    with open(path, "rb") as file:
        for line in file:
            its_step = _step(line)
            stays = line.endswith(b"\n") and its_step <= step
            complete &= stays
            last = max(last, its_step) if stays else last
    if not complete:
        with open(path, "rb") as file, replacing(path, "wb") as kept:
            kept.writelines(line for line in file if line.endswith(b"\n") and _step(line) <= step)
    return last


def _step(line: bytes) -> int:
    """The step of a line; 0 if it is not a line of metrics, so that it stays."""
    try:
        record = parse_json(line)
    except ValueError:
        return 0
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else 0
