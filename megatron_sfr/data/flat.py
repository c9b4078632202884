"""Flat binary files: arrays appended one after another while a folder is written, mapped into memory to be read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_sfr.data.manifest import FileRecord


class FlatWriter:
    """Appends arrays of one dtype and keeps the checksum of what it wrote."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115  closed by `close`; a writer lives as long as its folder is written
        self._sha256 = hashlib.sha256()

    def append(self, values: ArrayLike) -> None:
        data = np.asarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> FileRecord:
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._sha256.hexdigest()}


def map_flat(path: Path, dtype: DTypeLike) -> np.ndarray:
    """The whole file as a read-only array that is read from disk where it is used."""
    if path.stat().st_size == 0:  # the system maps no empty file
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
