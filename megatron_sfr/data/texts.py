"""The distinct texts of segments in a prepared folder, by number; all that an encoder needs of it.

- segments.jsonl: one JSON string a text; segment_offsets.bin (int64 [segments + 1])
- segment_digests.bin (uint8 [segments, 16]): `text_digest` of each, by which stores know a text again
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_sfr.data.flat import map_flat
from megatron_sfr.data.manifest import FileRecord

DTYPES: dict[str, type[np.generic]] = {
    "segments.jsonl": np.uint8,
    "segment_offsets.bin": np.int64,
    "segment_digests.bin": np.uint8,
}


class SegmentManifest(Protocol):
    """What of a prepared folder's manifest tells which texts it has."""

    @property
    def segments(self) -> int: ...
    @property
    def segments_sha256(self) -> str: ...
    @property
    def files(self) -> dict[str, FileRecord]: ...


class HasSegments(Protocol):
    """A prepared folder of either kind, as encoders and target stores see it."""

    @property
    def folder(self) -> Path: ...
    @property
    def manifest(self) -> SegmentManifest: ...
    def segment_text(self, row: int) -> str: ...


class SegmentTexts:
    """The texts, read where they are used."""

    def __init__(self, folder: Path) -> None:
        self._lines = map_flat(folder / "segments.jsonl", np.uint8)
        self._offsets = map_flat(folder / "segment_offsets.bin", np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"segment {row} of {len(self)}")
        start, end = self._offsets[row : row + 2]
        return json.loads(self._lines[start:end].tobytes())
