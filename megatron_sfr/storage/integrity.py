"""Checks that memory-mapped files still hold what was written: counts, offsets, and checksums of a bounded sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from megatron_sfr.storage.manifest import FileRecord, check_contents

SAMPLE_BYTES = 256 << 20  # of all folders of a run, so that it starts at once
CHUNK = 1 << 24  # elements of a memory-mapped array that are read at a time


def refuse(path: Path, what: str, hint: str) -> NoReturn:
    """ValueError for a damaged file."""
    raise ValueError(f"{path} is damaged: {what}; {hint}")


def check_counts(folder: Path, files: Mapping[str, FileRecord], expected: Mapping[str, int], hint: str) -> None:
    """ValueError where a manifest's counts and the sizes of its files, `expected` in bytes, contradict each other."""
    for name, size in expected.items():
        record = files.get(name)
        if record is None or record["bytes"] != size:
            recorded = "is not listed" if record is None else f"has {record['bytes']} bytes"
            refuse(folder / "manifest.json", f"{name} {recorded}, and its counts mean {size} bytes", hint)


def check_offsets(path: Path, offsets: np.ndarray, total: int, hint: str) -> None:
    """ValueError unless offsets start at 0, never decrease and end at `total`. Reads all of them."""
    if offsets[0] != 0 or offsets[-1] != total:
        refuse(path, f"the offsets run from {offsets[0]} to {offsets[-1]}, not from 0 to {total}", hint)
    for start in range(0, len(offsets) - 1, CHUNK):
        part = offsets[start : start + CHUNK + 1]
        if (falls := np.flatnonzero(part[1:] < part[:-1])).size:
            refuse(path, f"offset {start + falls[0] + 1} is less than the one before it", hint)


def check_sample(folder: Path, files: Mapping[str, FileRecord], hint: str, budget: int = SAMPLE_BYTES) -> list[str]:
    """Compares the checksums of the smallest files, up to `budget` bytes together. Returns their names."""
    chosen: dict[str, FileRecord] = {}
    for name, record in sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0])):
        budget -= record["bytes"]
        if budget < 0:
            break
        chosen[name] = record
    check_contents(folder, chosen, hint)
    return list(chosen)


def largest(values: np.ndarray) -> int:
    """The largest of a memory-mapped array, -1 if it is empty."""
    chunks = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
    return max((int(chunk.max()) for chunk in chunks), default=-1)
