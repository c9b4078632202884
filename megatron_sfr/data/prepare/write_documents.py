"""The files of a prepared corpus while they are written, chunk after chunk; `PreparedDocuments` reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.prepare.encode_documents import EncodedDocuments
from megatron_sfr.data.prepare.write_conversations import REJECTED
from megatron_sfr.data.prepare.write_segments import SegmentFiles
from megatron_sfr.data.prepared.documents import ANCHOR_DTYPES, CORPUS
from megatron_sfr.data.prepared.segment_texts import DTYPES as TEXT_DTYPES
from megatron_sfr.storage.integrity import FileRecord, sha256_of
from megatron_sfr.storage.journal import JournaledFiles
from megatron_sfr.storage.jsonl import BadRow, Place

TOKENS, INDEX, LENGTHS = f"{CORPUS}.bin", f"{CORPUS}.idx", "lengths.bin"
WriteIndex = Callable[[Path, np.ndarray, type[np.generic]], None]  # path, lengths int32 [documents], dtype of tokens


@dataclass
class Totals:
    """What was written up to `place`; the names are the manifest's."""

    place: Place = field(default_factory=Place)
    documents: int = 0
    tokens: int = 0
    anchors: int = 0
    max_token_id: int = -1
    rejected: int = 0
    first_bad: str = ""  # file:line: reason

    @property
    def rows(self) -> int:
        return self.documents + self.rejected


class DocumentFiles:
    """Appends chunks of documents and journals each; `totals.place` is where a run goes on."""

    def __init__(self, folder: Path, token_dtype: type[np.generic], about: dict[str, Any]) -> None:
        own: dict[str, type[np.generic]] = {TOKENS: token_dtype, LENGTHS: np.int32, REJECTED: np.uint8}
        self._folder, self._token_dtype = folder, token_dtype
        about = about | {"totals": [total.name for total in fields(Totals)]}  # another version of ours may keep others
        self._files = JournaledFiles(folder, ANCHOR_DTYPES | TEXT_DTYPES | own, about)
        self.segments = SegmentFiles(self._files)
        state = self._files.state
        if state is None:
            self.totals = Totals()
            self._files["anchor_offsets.bin"].append(0)
        else:
            self.totals = Totals(**state | {"place": Place(**state["place"])})

    def __enter__(self) -> DocumentFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, chunk: EncodedDocuments) -> None:
        """Writes a chunk, its bad rows aside with their reasons, and journals it."""
        totals, files = self.totals, self._files
        anchors = chunk.anchors.copy()
        anchors[:, 1] = self.segments.rows(chunk.segments)[anchors[:, 1]]
        files[TOKENS].append(chunk.tokens)
        files[LENGTHS].append(chunk.lengths)
        files["anchors.bin"].append(anchors)
        files["anchor_offsets.bin"].append(totals.anchors + np.cumsum(chunk.anchor_counts))
        for bad in chunk.bad:
            self._reject(bad)
        totals.documents += len(chunk.lengths)
        totals.tokens += int(chunk.lengths.sum(dtype=np.int64))
        totals.anchors += len(anchors)
        totals.max_token_id = max(totals.max_token_id, chunk.max_token_id)
        totals.place = chunk.end
        if totals.documents:  # of bad rows alone there is nothing to keep
            files.commit(asdict(totals))

    def finish(self, write_index: WriteIndex | None) -> dict[str, FileRecord]:
        """The finished files of the folder; with `write_index` the tokens too, with upstream's index of them."""
        records = self._files.finish()
        lengths, folder = np.fromfile(self._folder / LENGTHS, np.int32), self._folder
        published = {name: records[name] for name in ANCHOR_DTYPES | TEXT_DTYPES}
        if write_index is None:
            (folder / TOKENS).unlink()
        else:
            write_index(folder / INDEX, lengths, self._token_dtype)
            index = folder / INDEX
            published |= {TOKENS: records[TOKENS]}
            published[INDEX] = {"bytes": index.stat().st_size, "sha256": sha256_of(index)}
        (folder / LENGTHS).unlink()
        if not self.totals.rejected:
            (folder / REJECTED).unlink()
        return published

    def _reject(self, bad: BadRow) -> None:
        self.totals.first_bad = self.totals.first_bad or str(bad)
        self.totals.rejected += 1
        self._files[REJECTED].append(np.frombuffer(bad.line(), np.uint8))
