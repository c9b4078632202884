"""Prepared folders of documents: Megatron's .bin and .idx, and the anchors of each document.

- manifest.json: written last
- documents.bin, documents.idx: upstream's indexed dataset, unless the manifest names an existing one
- anchors.bin (int32 [anchors, 3]): position, segment and horizon as in `Anchors`, by document, position, horizon;
  anchor_offsets.bin (int64 [documents + 1]) separates them
- segments.jsonl, segment_offsets.bin, segment_digests.bin: see segment_texts.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_sfr.data.prepared import segment_texts
from megatron_sfr.data.segments.segmenters import Segmenter
from megatron_sfr.storage.arrays import map_flat
from megatron_sfr.storage.integrity import (
    SAMPLE_BYTES,
    FileRecord,
    StoredFileError,
    check_contents,
    check_counts,
    check_offsets,
    check_sample,
    check_sizes,
    hint,
    refuse,
)
from megatron_sfr.storage.manifest import InputRecord, read_manifest

CORPUS = "documents"  # the indexed dataset inside its folder
ANCHOR_DTYPES: dict[str, type[np.generic]] = {"anchors.bin": np.int32, "anchor_offsets.bin": np.int64}
COLUMNS = 3


@dataclass(frozen=True)
class DocumentsManifest:
    """Contents and origin of a folder of prepared documents."""

    kind: ClassVar[str] = "prepared documents"
    version: ClassVar[int] = 1

    documents: int
    tokens: int
    anchors: int
    """Number of anchors, each counted once for each horizon at which it has a target."""
    segments: int
    """Number of distinct segments."""
    rejected: int
    stride: int
    horizons: list[list[int]]
    min_segment_length: int
    segmenter: Segmenter
    eod: int
    """The token that ends a document."""
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    segments_sha256: str
    corpus: str
    """Prefix of the .bin and .idx, inside the folder or an absolute path."""
    text_key: str
    inputs: list[InputRecord]
    """Files of records, or the .idx of an existing corpus."""
    files: dict[str, FileRecord]
    max_token_id: int | None = None
    """The largest token id; None in folders of earlier releases."""
    corpus_files: dict[str, FileRecord] | None = None
    """Sizes and checksums of the .bin and .idx of an existing corpus."""


class PreparedDocuments:
    """The documents of a prepared folder.

    `open` checks the manifest and the sizes of files, `anchors` ranges, `check` all offsets and some checksums,
    `verify` every byte.
    """

    def __init__(self, folder: Path, manifest: DocumentsManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._repair = repair(folder)
        self.texts = segment_texts.SegmentTexts(folder, self._repair)
        self._anchors = map_flat(folder / "anchors.bin", np.int32).reshape(-1, COLUMNS)
        self._offsets = map_flat(folder / "anchor_offsets.bin", np.int64)

    @classmethod
    def open(cls, folder: Path) -> PreparedDocuments:
        """Opens a folder. Raises ValueError if it is incomplete, damaged or of another version, or has no corpus."""
        folder = Path(folder)
        with repair(folder):
            manifest = read_manifest(folder, DocumentsManifest)
            check_sizes(folder, manifest.files)
            check_counts(folder, manifest.files, _bytes_of(manifest))
            opened = cls(folder, manifest)
            for end in (".bin", ".idx"):
                if not (path := Path(f"{opened.corpus}{end}")).is_file():
                    raise StoredFileError(f"{path}, the corpus of {folder}, is missing")
            check_sizes(Path(), opened._corpus_records())
        return opened

    def _corpus_records(self) -> dict[str, FileRecord]:
        """The files of a corpus outside the folder, by path."""
        return {f"{self.corpus}{end}": record for end, record in (self.manifest.corpus_files or {}).items()}

    def check(self, budget: int = SAMPLE_BYTES) -> None:
        """Checks offsets, and checksums of `budget` bytes of files, at the start of a run. Raises ValueError."""
        with self._repair:
            check_offsets(self.folder / "anchor_offsets.bin", self._offsets, self.manifest.anchors)
            check_sample(self.folder, self.manifest.files | self._corpus_records(), budget)

    @property
    def corpus(self) -> str:
        """The prefix that upstream's IndexedDataset opens."""
        return str(self.folder / self.manifest.corpus)

    def verify(self) -> None:
        """Reads every byte. Raises ValueError, with the file's name, if one is not what was written."""
        with self._repair:
            check_contents(self.folder, self.manifest.files | self._corpus_records())

    def __len__(self) -> int:
        return self.manifest.documents

    def anchors(
        self, document: int, start: int = 0, end: int = np.iinfo(np.int32).max
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, segment and horizon, int64 [A] each, of the anchors at start <= position < end of a document."""
        with self._repair:
            rows = self._document_anchors(document)
        first, last = np.searchsorted(rows[:, 0], [start, end])
        position, segment, horizon = rows[first:last].astype(np.int64).T
        return position, segment, horizon

    def _document_anchors(self, document: int) -> np.ndarray:
        """int32 [A, 3]: all anchors of a document. Raises StoredFileError if one is out of range."""
        begin, stop = self._offsets[document : document + 2].tolist()
        if not 0 <= begin <= stop <= len(self._anchors):
            what = f"document {document} runs from {begin} to {stop} of {len(self._anchors)}"
            refuse(self.folder / "anchor_offsets.bin", what)
        rows = self._anchors[begin:stop]
        if (rows < 0).any() or (rows[:, 1:] >= (self.manifest.segments, len(self.manifest.horizons))).any():
            refuse(self.folder / "anchors.bin", f"an anchor of document {document} is out of range")
        return rows

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again: pickling would copy the memory maps.
        return PreparedDocuments.open, (self.folder,)


def _bytes_of(manifest: DocumentsManifest) -> dict[str, int]:
    """The size of each file that the manifest's counts imply."""
    own = {"anchors.bin": 4 * COLUMNS * manifest.anchors, "anchor_offsets.bin": 8 * (manifest.documents + 1)}
    return own | segment_texts.bytes_of(manifest)


def repair(folder: Path) -> hint:
    """A hint with the command that prepares a folder of documents again."""
    return hint(f"run: megatron-sfr prepare-text --input FILE --tokenizer DIR --output {folder} --force")
