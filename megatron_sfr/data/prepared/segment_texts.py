"""The distinct texts of segments in a prepared folder: all that an encoder needs of it.

- segments.jsonl: a JSON string for each text; segment_offsets.bin (int64 [segments + 1])
- segment_digests.bin (uint8 [segments, 16]): `text_digest` of each, by which stores recognize a text
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_sfr.data.segments.anchors import DIGEST_BYTES
from megatron_sfr.storage.arrays import map_flat
from megatron_sfr.storage.integrity import FileRecord, check_contents, hint, refuse

DTYPES: dict[str, type[np.generic]] = {
    "segments.jsonl": np.uint8,
    "segment_offsets.bin": np.int64,
    "segment_digests.bin": np.uint8,
}


class SegmentManifest(Protocol):
    """The fields of a prepared folder's manifest that identify its texts."""

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
    @property
    def texts(self) -> SegmentTexts: ...


class SegmentTexts:
    """The distinct texts of a folder by index, each read from the disk when it is used."""

    def __init__(self, folder: Path, repair: hint) -> None:
        """repair: what to run if they are damaged."""
        self._folder, self._repair = folder, repair
        self._lines = map_flat(folder / "segments.jsonl", np.uint8)
        self._offsets = map_flat(folder / "segment_offsets.bin", np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        with self._repair:
            return self._text(index)

    def _text(self, index: int) -> str:
        start, end = self._offsets[index : index + 2].tolist()
        if not 0 <= start < end <= len(self._lines):
            refuse(self._folder / "segment_offsets.bin", f"segment {index} runs from {start} to {end}")
        try:
            text = json.loads(self._lines[start:end].tobytes())
        except ValueError:
            text = None
        if not isinstance(text, str):
            refuse(self._folder / "segments.jsonl", f"segment {index} is not a JSON string")
        return text

    def check(self, files: Mapping[str, FileRecord]) -> None:
        """Reads all texts. Raises ValueError if they are not what was written."""
        with self._repair:
            check_contents(self._folder, {name: files[name] for name in DTYPES})


def bytes_of(manifest: SegmentManifest) -> dict[str, int]:
    """The sizes of the two files that the manifest's counts imply."""
    return {"segment_offsets.bin": 8 * (manifest.segments + 1), "segment_digests.bin": DIGEST_BYTES * manifest.segments}
