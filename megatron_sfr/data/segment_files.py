"""The distinct texts of segments while they are collected: a chunk's in a worker, all of them in a folder's files."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from megatron_sfr.data.journal import JournaledFiles
from megatron_sfr.data.segments import DIGEST_BYTES, DistinctTexts, text_digest

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
        rows = np.empty(len(segments), np.int32)
        for number, (digest, line) in enumerate(segments):
            rows[number], is_new = self._texts.row(digest)
            if is_new:
                self._files["segments.jsonl"].append(np.frombuffer(line, np.uint8))
                self._files["segment_offsets.bin"].append(self._files["segments.jsonl"].bytes)
                self._files["segment_digests.bin"].append(np.frombuffer(digest, np.uint8))
        return rows
