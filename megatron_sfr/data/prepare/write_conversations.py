"""The files of a prepared folder while they are written, chunk after chunk; `PreparedData` reads them.

Memory grows with the number of distinct segments alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.prepare.encode_conversations import COLUMNS, EncodedChunk
from megatron_sfr.data.prepare.write_segments import SegmentFiles
from megatron_sfr.data.prepared.conversations import DTYPES
from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.journal import JournaledFiles
from megatron_sfr.storage.jsonl import BadRow, Place

REJECTED = "rejected.jsonl"
SAMPLE_DIGESTS = "sample_digests.bin"  # by which duplicates are counted; not published
SEGMENT = COLUMNS.index("segment")


@dataclass
class Totals:
    """What was written up to `place`; the names are the manifest's."""

    place: Place = field(default_factory=Place)
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    max_response_tokens: int = 0
    anchors: int = 0
    max_anchors: int = 0
    truncated: int = 0
    rejected: int = 0
    max_token_id: int = -1
    reply_end_tokens: list[int] = field(default_factory=list)
    personas: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""  # file:line: reason

    @property
    def rows(self) -> int:
        return self.samples + self.rejected


class SampleFiles:
    """Appends chunks of samples and journals each; `totals.place` is where a run goes on."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder = folder
        dtypes = DTYPES | {SAMPLE_DIGESTS: np.uint64, REJECTED: np.uint8}
        about = about | {"totals": [total.name for total in fields(Totals)]}  # another version of ours may keep others
        self._files = JournaledFiles(folder, dtypes, about)
        self.segments = SegmentFiles(self._files)
        state = self._files.state
        if state is None:
            self.totals = Totals()
            for name in ("offsets.bin", "anchor_offsets.bin"):
                self._files[name].append(0)
        else:
            self.totals = Totals(**state | {"place": Place(**state["place"])})
        self._persona_rows = {persona: row for row, persona in enumerate(self.totals.personas)}

    def __enter__(self) -> SampleFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, chunk: EncodedChunk) -> None:
        """Writes a chunk, its bad rows aside with their reasons, and journals it."""
        totals, files = self.totals, self._files
        rows = self.segments.rows(chunk.segments)
        anchors = chunk.anchors.copy()
        anchors[:, SEGMENT] = rows[anchors[:, SEGMENT]]
        files["tokens.bin"].append(chunk.tokens)
        files["mask.bin"].append(chunk.loss_mask)
        files["offsets.bin"].append(totals.tokens + np.cumsum(chunk.lengths))
        files["anchors.bin"].append(anchors)
        files["anchor_offsets.bin"].append(totals.anchors + np.cumsum(chunk.anchor_counts))
        files[SAMPLE_DIGESTS].append(chunk.digests)
        files["personas.bin"].append(
            [self._persona_rows.setdefault(p, len(self._persona_rows)) for p in chunk.personas]
        )
        for persona in chunk.personas:
            totals.personas[persona] = totals.personas.get(persona, 0) + 1
        for bad in chunk.bad:
            self._reject(bad)
        totals.samples += chunk.samples
        totals.tokens += len(chunk.tokens)
        totals.supervised_tokens += int(chunk.supervised.sum())
        totals.max_response_tokens = max(totals.max_response_tokens, int(chunk.supervised.max(initial=0)))
        totals.anchors += len(anchors)
        totals.max_anchors = max(totals.max_anchors, int(chunk.anchor_counts.max(initial=0)))
        totals.max_token_id = max(totals.max_token_id, int(chunk.tokens.max(initial=-1)))
        totals.reply_end_tokens = sorted(chunk.end_tokens.union(totals.reply_end_tokens))
        totals.truncated += chunk.truncated
        totals.place = chunk.end
        if totals.samples:  # of bad rows alone there is nothing to keep
            files.commit(asdict(totals))

    def finish(self) -> tuple[dict[str, FileRecord], int]:
        """The finished files of the folder, and how many samples have the token ids of an earlier one."""
        records = self._files.finish()
        path = self._folder / SAMPLE_DIGESTS
        duplicates = self.totals.samples - len(np.unique(np.fromfile(path, np.uint64)))
        path.unlink()
        if not self.totals.rejected:
            (self._folder / REJECTED).unlink()
        return {name: records[name] for name in DTYPES}, duplicates

    def _reject(self, bad: BadRow) -> None:
        self.totals.first_bad = self.totals.first_bad or str(bad)
        self.totals.rejected += 1
        self._files[REJECTED].append(np.frombuffer(bad.line(), np.uint8))
