"""fp16 vectors in a memory-mapped array file, each with a checksum, so that damage is known for each vector.

- vectors.bin (fp16 [rows, D])
- checksums.bin (uint32 [rows]): CRC-32 of each row's bytes; 0 if it is missing (a CRC of 0 is stored as 1)

Several processes may read and write the same files at the same time, without locks: a row whose writing was
interrupted by a kill or a power failure has no checksum or a wrong one, and counts as missing.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from megatron_sfr.storage.arrays import map_flat

VECTORS = "vectors.bin"
CHECKSUMS = "checksums.bin"
CHUNK_ROWS = 4096
"""Rows that are read at a time when all are read."""


def row_sizes(rows: int, dim: int) -> dict[str, int]:
    """Bytes of each of the two files."""
    return {VECTORS: rows * dim * np.dtype(np.float16).itemsize, CHECKSUMS: rows * np.dtype(np.uint32).itemsize}


class Embeddings:
    """The rows of a folder, memory-mapped: what other processes write is visible at once. The files have full size."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.vectors = map_flat(folder / VECTORS, np.float16).reshape(-1, dim)
        self._checksums = map_flat(folder / CHECKSUMS, np.uint32)

    def __len__(self) -> int:
        return len(self._checksums)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors fp16 [n, D], a copy, and bool [n]: which of them are present and undamaged."""
        vectors, expected = self.vectors[rows], self._checksums[rows]
        found = np.fromiter((_checksum(vector) for vector in vectors), np.uint32, len(vectors))
        return vectors, found == expected

    def begun(self, rows: slice | np.ndarray) -> np.ndarray:
        """bool [n]: which rows have a checksum, right or wrong. Reads no vector."""
        return self._checksums[rows] != 0

    def missing(self) -> np.ndarray:
        """Rows that are missing or damaged, int64, ascending. Reads everything."""
        bad = [chunk[~self.read(chunk)[1]] for chunk in chunks(len(self))]
        return np.concatenate([np.empty(0, np.int64), *bad])


class EmbeddingWriter:
    """Writes rows into the files of a folder, created at full size. Raises ValueError if the disk is too small."""

    def __init__(self, folder: Path, rows: int, dim: int) -> None:
        with ExitStack() as stack:
            self._files = []
            for name, size in row_sizes(rows, dim).items():
                file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, file)
                _resize(folder / name, file, size)
                self._files.append(file)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Writes vectors fp16 [n, D] into rows [n], and the checksum of each after it."""
        vector_file, checksum_file = self._files
        for row, vector in zip(rows.tolist(), vectors, strict=True):
            checksum = np.uint32(_checksum(vector)).tobytes()
            os.pwrite(vector_file, vector.data, row * vector.nbytes)
            os.pwrite(checksum_file, checksum, row * len(checksum))

    def sync(self) -> None:
        """Flushes both files to the disk."""
        for file in self._files:
            os.fsync(file)


def chunks(rows: int) -> Iterator[np.ndarray]:
    """The indices 0 ... rows - 1, int64, CHUNK_ROWS at a time."""
    for first in range(0, rows, CHUNK_ROWS):
        yield np.arange(first, min(first + CHUNK_ROWS, rows))


def _resize(path: Path, file: int, size: int) -> None:
    """Reserves the space at once, so that a run of days does not end on a full disk."""
    missing = size - os.fstat(file).st_size
    if missing > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f"{path} needs {missing / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB left; make room")
    if missing:
        os.ftruncate(file, size)
        os.posix_fallocate(file, 0, size)


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.data) or 1
