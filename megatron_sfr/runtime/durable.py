"""Rows that let upstream write its small files atomically, with CUDA and without.

Upstream truncates its tracker file and a checkpoint's metadata.json before it writes them, and does not flush them:
a kill or a crash at that moment leaves them empty.
"""

import functools
import os
from pathlib import Path
from typing import Any

from megatron_sfr.runtime.cpu import Row, wrapper
from megatron_sfr.storage.atomic import replacing

DURABLE = ("latest_checkpointed_iteration.txt", "metadata.json")


class DurableFiles:
    """Upstream's file access, but that the files of DURABLE are replaced whole."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As the built-in open. Objects in other storage (msc://) are written whole by upstream already."""
        if mode == "w" and os.path.basename(path) in DURABLE and "://" not in str(path):
            return replacing(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


@wrapper
def _durable(original: Any) -> Any:
    return DurableFiles(original)


WHY = "truncates the file before writing it, and does not flush it to the disk"
ROWS = (
    Row("megatron.training.checkpointing", "maybe_msc", _durable, f"{WHY}: the tracker"),
    Row("megatron.core.dist_checkpointing.core", "maybe_msc", _durable, f"{WHY}: metadata.json"),
)


@functools.cache  # once a process
def install() -> None:
    """Applies every row, whatever the backend."""
    for row in ROWS:
        row.apply()
