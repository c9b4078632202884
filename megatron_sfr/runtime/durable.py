"""Lets upstream write its small files atomically, on any backend.

Upstream truncates its tracker file and a checkpoint's metadata.json before it writes them, and does not flush them:
a kill or a crash at that moment leaves them empty.
"""

import os
from pathlib import Path
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, wrapper
from megatron_sfr.storage.atomic import replacing

DURABLE = ("latest_checkpointed_iteration.txt", "metadata.json")


class DurableFiles:
    """Upstream's file access, except that the files of DURABLE are replaced atomically."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As the built-in open. Upstream already writes objects in other storage (msc://) atomically."""
        if mode == "w" and os.path.basename(path) in DURABLE and "://" not in str(path):
            return replacing(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


@wrapper
def _durable(original: Any) -> Any:
    return DurableFiles(original)


WHY = "truncates the file before writing it, and does not flush it to the disk"
REPLACEMENTS = (
    Replacement("megatron.training.checkpointing", "maybe_msc", _durable, f"{WHY}: the tracker"),
    Replacement("megatron.core.dist_checkpointing.core", "maybe_msc", _durable, f"{WHY}: metadata.json"),
)
