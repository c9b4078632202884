"""The files of a prepared folder while they are written, chunk by chunk, with a journal from which a run resumes.

Memory grows with the number of distinct segments only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_sfr.data.segments.anchors import DIGEST_BYTES, ChunkSegment, DistinctTexts
from megatron_sfr.storage.arrays import JournaledFiles
from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.jsonl import BadRecord, Position

REJECTED = "rejected.jsonl"
SEGMENT = 1
"""The column of the anchors that has the segment, in conversations and in documents."""


class EncodedChunk(Protocol):
    """What the writer needs of the result of a worker."""

    @property
    def end(self) -> Position: ...
    @property
    def anchors(self) -> np.ndarray:
        """int32 [A, C]; the column SEGMENT counts within the segments of the chunk."""
        ...

    @property
    def anchor_counts(self) -> np.ndarray:
        """int64 [S]: the anchors of each sample."""
        ...

    @property
    def segments(self) -> list[ChunkSegment]: ...
    @property
    def bad(self) -> list[BadRecord]: ...


class Totals(Protocol):
    """A dataclass of JSON values: what the files hold up to `position`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    position: Position
    anchors: int
    rejected: int
    first_bad: str
    """file:line: reason of the first bad record."""

    @property
    def samples(self) -> int: ...
    def columns(self, chunk: Any) -> Mapping[str, ArrayLike]:
        """What a chunk appends to each file, but for the anchors and the segments. `add` comes after it."""
        ...

    def add(self, chunk: Any) -> None:
        """Counts a chunk, but for what the writer counts: anchors, bad records and the position."""
        ...


class FolderWriter:
    """Appends chunks to the files of a folder and journals each. `totals.position` is where a run resumes."""

    def __init__(
        self, folder: Path, dtypes: Mapping[str, type[np.generic]], totals: Totals, about: dict[str, Any]
    ) -> None:
        """dtypes: the files by name, but for rejected.jsonl. totals: of an empty folder.

        about: what decides the bytes (JSON values); the journal of something else is discarded.
        """
        self.folder = folder
        about = about | {"totals": [total.name for total in fields(totals)]}  # another version may have others
        self._files = JournaledFiles(folder, {**dtypes, REJECTED: np.uint8}, about)
        self.totals, state = totals, self._files.state
        if state is not None:
            self.totals = type(totals)(**state | {"position": Position(**state["position"])})
        else:
            for name in dtypes:
                if name.endswith("offsets.bin"):
                    self._files[name].append(0)
        self._texts = DistinctTexts()
        digests = (folder / "segment_digests.bin").read_bytes()
        for start in range(0, len(digests), DIGEST_BYTES):
            self._texts.row(digests[start : start + DIGEST_BYTES])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def segments(self) -> int:
        """Distinct segments."""
        return len(self._texts)

    def add(self, chunk: EncodedChunk) -> None:
        """Appends a chunk and its bad records, and journals it."""
        totals, files = self.totals, self._files
        anchors = chunk.anchors.copy()
        anchors[:, SEGMENT] = self._add_segments(chunk.segments)[anchors[:, SEGMENT]]
        files["anchors.bin"].append(anchors)
        files["anchor_offsets.bin"].append(totals.anchors + np.cumsum(chunk.anchor_counts))
        for name, values in totals.columns(chunk).items():
            files[name].append(values)
        for bad in chunk.bad:
            totals.first_bad = totals.first_bad or str(bad)
            totals.rejected += 1
            files[REJECTED].append(np.frombuffer(bad.line(), np.uint8))
        totals.add(chunk)
        totals.anchors += len(anchors)
        totals.position = chunk.end
        if totals.samples:  # bad records alone are not worth keeping
            files.commit(asdict(totals))

    def finish(self) -> dict[str, FileRecord]:
        """Flushes the files and returns their records; rejected.jsonl, which has none, goes if it is empty."""
        records = self._files.finish()
        del records[REJECTED]
        if not self.totals.rejected:
            (self.folder / REJECTED).unlink()
        return records

    def _add_segments(self, segments: Sequence[ChunkSegment]) -> np.ndarray:
        """Writes the texts that are new. Returns the numbers of all, int32 [len(segments)]."""
        numbered = [self._texts.row(digest) for digest, _ in segments]
        new = [segment for segment, (_, is_new) in zip(segments, numbered, strict=True) if is_new]
        ends = self._files["segments.jsonl"].bytes + np.cumsum([len(line) for _, line in new], dtype=np.int64)
        self._files["segments.jsonl"].append(np.frombuffer(b"".join(line for _, line in new), np.uint8))
        self._files["segment_digests.bin"].append(np.frombuffer(b"".join(digest for digest, _ in new), np.uint8))
        self._files["segment_offsets.bin"].append(ends)
        return np.array([number for number, _ in numbered], np.int32)
