"""Memory-mapped array files: arrays of one dtype, appended while a folder is written and memory-mapped for reading."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_sfr.storage.integrity import FileRecord

BLOCK = 1 << 20


class FlatWriter:
    """Appends arrays of one dtype to a file and maintains its checksum.

    Creates the file, or appends after the bytes recorded in `kept`. Raises ValueError if these bytes have changed.
    """

    def __init__(self, path: Path, dtype: DTypeLike, kept: FileRecord | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._sha256 = hashlib.sha256()
        self._file = open(path, "r+b" if kept else "wb")  # noqa: SIM115  closed on leaving the writer's own `with`
        if kept:
            try:
                self._go_on(path, kept)
            except ValueError:
                self._file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: ArrayLike) -> None:
        data = np.asarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)

    @property
    def bytes(self) -> int:
        """Size of the file: kept and appended bytes."""
        return self._file.tell()

    def flush(self) -> FileRecord:
        """Passes appended data to the operating system, so that it survives this process. Returns the file's record."""
        self._file.flush()
        return {"bytes": self._file.tell(), "sha256": self._sha256.hexdigest()}

    def finish(self) -> FileRecord:
        """Flushes to disk. Returns the file's record."""
        record = self.flush()
        os.fsync(self._file.fileno())
        return record

    def _go_on(self, path: Path, kept: FileRecord) -> None:
        left = kept["bytes"]
        while left and (block := self._file.read(min(left, BLOCK))):
            self._sha256.update(block)
            left -= len(block)
        if left or self._sha256.hexdigest() != kept["sha256"]:
            raise ValueError(f"{path} is not what was written; remove it")
        self._file.seek(kept["bytes"])  # between reading and writing
        self._file.truncate()


def map_flat(path: Path, dtype: DTypeLike) -> np.ndarray:
    """The file as a read-only memory-mapped array."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
