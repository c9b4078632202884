"""Flat binary files: arrays appended one after another while a folder is written, mapped into memory to be read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_sfr.data.manifest import FileRecord


class FlatWriter:
    """Appends arrays of one dtype to a new file and keeps the checksum of what it wrote."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115  closed on leaving the writer's own `with`
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: ArrayLike) -> None:
        data = np.asarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)

    def finish(self) -> FileRecord:
        """Flushes to the disk and says what is there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "sha256": self._sha256.hexdigest()}


def map_flat(path: Path, dtype: DTypeLike) -> np.ndarray:
    """The whole file as a read-only array that is read from disk where it is used."""
    if path.stat().st_size == 0:  # the system maps no empty file
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
