"""The distinct texts of segments while they are collected: a chunk's in a worker, all of them in a folder's files."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from megatron_sfr.data.segments.anchors import DIGEST_BYTES, DistinctTexts, text_digest
from megatron_sfr.storage.journal import JournaledFiles

ChunkSegment = tuple[bytes, bytes]  # digest, and line of segments.jsonl


class ChunkTexts:
    """Texts of one chunk, numbered in order of appearance."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[int, bytes]] = {}

    def number(self, text: str) -> int:
        digest = text_digest(text)
        if digest not in self._found:
            line = (json.dumps(text, ensure_ascii=False) + "\n").encode("utf-8")
            self._found[digest] = len(self._found), line
        return self._found[digest][0]

    def segments(self) -> list[ChunkSegment]:
        return [(digest, line) for digest, (_, line) in self._found.items()]


class SegmentFiles:
    """Writes each text that was not met before; memory grows with their number, by a digest each."""

    def __init__(self, files: JournaledFiles) -> None:
        """Goes on after the texts that the files hold, or begins them."""
        self._files, self._texts = files, DistinctTexts()
        if files.state is None:
            files["segment_offsets.bin"].append(0)
        digests = (files.folder / "segment_digests.bin").read_bytes()
        for start in range(0, len(digests), DIGEST_BYTES):
            self._texts.row(digests[start : start + DIGEST_BYTES])

    def __len__(self) -> int:
        return len(self._texts)

    def rows(self, segments: Sequence[ChunkSegment]) -> np.ndarray:
        """Rows of the store, int32 [len(segments)]."""
        numbered = [self._texts.row(digest) for digest, _ in segments]
        new = [segment for segment, (_, is_new) in zip(segments, numbered, strict=True) if is_new]
        ends = self._files["segments.jsonl"].bytes + np.cumsum([len(line) for _, line in new], dtype=np.int64)
        self._files["segments.jsonl"].append(np.frombuffer(b"".join(line for _, line in new), np.uint8))
        self._files["segment_digests.bin"].append(np.frombuffer(b"".join(digest for digest, _ in new), np.uint8))
        self._files["segment_offsets.bin"].append(ends)
        return np.array([row for row, _ in numbered], np.int32)
