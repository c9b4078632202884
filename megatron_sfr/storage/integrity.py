"""Checks that stored files hold what was written: sizes, checksums, counts, offsets; and `hint`, which says what to do.

Functions that find damage do not know which command repairs it. They raise `StoredFileError`; their caller names the
command once, in a `with hint(...)` around the calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

import numpy as np

SAMPLE_BYTES = 256 << 20
"""Bytes whose checksums are compared at the start of a run, in all folders together."""
CHUNK = 1 << 24
"""Elements of a memory-mapped array that are read at a time."""


class FileRecord(TypedDict):
    """Size and checksum of a file when it was written."""

    bytes: int
    sha256: str


class StoredFileError(ValueError):
    """A stored file or folder is missing, damaged, of another version or of other data."""


class hint:
    """A context that adds `; what` to a StoredFileError raised in its block.

    The error that leaves the block is a plain ValueError, so only the innermost of nested hints is added. All other
    errors pass unchanged. One object may be entered many times.

    Example:
        >>> with hint("run: megatron-sfr prepare --force"):
        ...     raise StoredFileError("out/ is incomplete")
        Traceback (most recent call last):
        ValueError: out/ is incomplete; run: megatron-sfr prepare --force
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, StoredFileError):
            raise ValueError(f"{error}; {self._what}") from error


def refuse(path: Path, what: str) -> NoReturn:
    """Raises StoredFileError for a damaged file."""
    raise StoredFileError(f"{path} is damaged: {what}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """The size and the checksum that a file has now. Reads it completely."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_size(path: Path, expected: int) -> None:
    """Raises StoredFileError unless the file exists with this size."""
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        actual = "is missing" if size is None else f"has {size} bytes instead of {expected}"
        raise StoredFileError(f"{path} {actual}")


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raises StoredFileError unless each file exists with its recorded size. Reads no content."""
    for name, record in files.items():
        check_size(folder / name, record["bytes"])


def check_contents(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raises StoredFileError unless each file has its recorded checksum. Reads every file completely."""
    check_sizes(folder, files)
    for name, record in files.items():
        if sha256_of(folder / name) != record["sha256"]:
            raise StoredFileError(f"{folder / name} is not what was written (its sha256 differs)")


def check_counts(folder: Path, files: Mapping[str, FileRecord], expected: Mapping[str, int]) -> None:
    """Raises StoredFileError unless the recorded sizes are those that the manifest's counts imply, `expected` bytes."""
    for name, size in expected.items():
        record = files.get(name)
        if record is None or record["bytes"] != size:
            recorded = "is not listed" if record is None else f"has {record['bytes']} bytes"
            refuse(folder / "manifest.json", f"{name} {recorded}, and its counts mean {size} bytes")


def check_offsets(path: Path, offsets: np.ndarray, total: int) -> None:
    """Raises StoredFileError unless offsets start at 0, never decrease and end at `total`. Reads all of them."""
    if offsets[0] != 0 or offsets[-1] != total:
        refuse(path, f"the offsets run from {offsets[0]} to {offsets[-1]}, not from 0 to {total}")
    for start in range(0, len(offsets) - 1, CHUNK):
        part = offsets[start : start + CHUNK + 1]
        if (falls := np.flatnonzero(part[1:] < part[:-1])).size:
            refuse(path, f"offset {start + falls[0] + 1} is less than the one before it")


def check_sample(folder: Path, files: Mapping[str, FileRecord], budget: int = SAMPLE_BYTES) -> list[str]:
    """Compares the checksums of the smallest files, up to `budget` bytes in total. Returns their names."""
    chosen: dict[str, FileRecord] = {}
    for name, record in sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0])):
        budget -= record["bytes"]
        if budget < 0:
            break
        chosen[name] = record
    check_contents(folder, chosen)
    return list(chosen)


def largest(values: np.ndarray) -> int:
    """The largest element of a memory-mapped array, -1 if it is empty."""
    chunks = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
    return max((int(chunk.max()) for chunk in chunks), default=-1)
