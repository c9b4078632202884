"""Fills target stores in fixed blocks, so that the bits of an embedding do not depend on when and where it is encoded.

The last bits of an embedding depend on the batch in which it is computed. A block is `block_rows` consecutive segments.
Its texts are sorted by length and divided into batches of `batch_size`; those that were copied from another store are
kept apart from the others. So an embedding is a function of the store's identity, its texts and the copied rows: for
any order of blocks and any number of processes, before training or during it, with or without interruptions.

Processes that fill one store at the same time lock a block by its byte of claims.lock. The system releases the lock
when its holder ends. Locks only avoid double work: a race would write equal bits.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from megatron_sfr.data.prepared.segment_texts import HasSegments
from megatron_sfr.data.segments.anchors import DIGEST_BYTES, text_digest
from megatron_sfr.data.targets.statistics import statistics_of
from megatron_sfr.data.targets.store import (
    COPIED,
    DIGESTS,
    STATISTICS,
    EncoderIdentity,
    TargetManifest,
    TargetStore,
    embed_hint,
)
from megatron_sfr.data.targets.vectors import EmbeddingWriter
from megatron_sfr.storage.arrays import FlatWriter, map_flat
from megatron_sfr.storage.integrity import FileRecord, StoredFileError, check_contents, hint
from megatron_sfr.storage.manifest import read_manifest, write_manifest

CLAIMS = "claims.lock"


class TextEncoder(Protocol):
    """Turns texts into vectors; `Encoder` is one."""

    @property
    def identity(self) -> EncoderIdentity: ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """fp32 or fp16 [len(texts), D]; one batch, in the order given."""
        ...


class StoreWriter:
    """A store that is open for writing. Open it once in a process: locks do not exclude their own process."""

    def __init__(self, folder: Path, prepared: HasSegments) -> None:
        self.store = TargetStore.open(folder, prepared, partial=True)
        manifest = self.store.manifest
        self.blocks = -(-manifest.segments // manifest.block_rows)
        self._first_unfinished = 0  # every block before this one is complete
        fixed = {name: manifest.files[name] for name in (COPIED, DIGESTS)}
        with embed_hint(folder, prepared, manifest, "--verify"):
            check_contents(folder, fixed)
        self._copied = np.fromfile(folder / COPIED, np.uint8).astype(bool)
        self._digests = map_flat(folder / DIGESTS, np.uint8).reshape(-1, DIGEST_BYTES)
        with ExitStack() as stack:
            self._writer = stack.enter_context(EmbeddingWriter(folder, manifest.segments, manifest.dim))
            self._claims = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, self._claims)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def rows_of(self, block: int) -> slice:
        first = block * self.store.manifest.block_rows
        return slice(first, min(first + self.store.manifest.block_rows, len(self.store)))

    def blocks_of(self, rows: np.ndarray) -> list[int]:
        """The blocks that hold any of these rows, ascending."""
        return np.unique(rows // self.store.manifest.block_rows).tolist()

    def fill(self, block: int, encoder: TextEncoder) -> bool:
        """Encodes what is missing of a block. Returns False if another process holds its lock."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
        except BlockingIOError:
            return False
        try:
            rows = np.arange(*self.rows_of(block).indices(len(self.store)))
            missing = ~self.store.embeddings.read(rows)[1]
            for copied in (False, True):
                group = self._copied[rows] == copied
                if (needed := missing & group).any():
                    vectors = np.empty((len(rows), self.store.dim), np.float16)
                    vectors[group] = self._encode(rows[group], encoder)
                    self._writer.write(rows[needed], vectors[needed])
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, block)
        return True

    def _encode(self, rows: np.ndarray, encoder: TextEncoder) -> np.ndarray:
        """fp16 [len(rows), dim]. Encodes the longest texts first: batches of similar lengths need little padding."""
        texts = [self._text(row) for row in rows.tolist()]
        vectors = np.empty((len(texts), self.store.dim), np.float16)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.store.manifest.batch_size):
            batch = order[start : start + self.store.manifest.batch_size]
            vectors[batch] = encoder.encode([texts[i] for i in batch])
        return vectors

    def _text(self, row: int) -> str:
        """The text of a segment. Raises ValueError if it is not the text that the store was made for."""
        text = self.store.prepared.texts[row]
        if text_digest(text) != self._digests[row].tobytes():
            prepared = self.store.prepared
            with hint(f"run: megatron-sfr inspect --verify --data {prepared.folder}"):
                raise StoredFileError(
                    f"{prepared.folder / 'segments.jsonl'} is damaged: segment {row} is not the text that was prepared "
                    "(its digest differs)"
                )
        return text

    def all_begun(self) -> bool:
        """Whether every embedding has a checksum, right or wrong. Cheap: finished blocks are not read again."""
        while self._first_unfinished < self.blocks:
            if not self.store.embeddings.begun(self.rows_of(self._first_unfinished)).all():
                return False
            self._first_unfinished += 1
        return True

    def complete(self) -> np.ndarray:
        """Reads every embedding. If none is missing or damaged, writes the statistics and marks the store complete.

        Of several processes the first one writes.

        Returns:
            The rows that are missing or damaged, int64.
        """
        fcntl.lockf(self._claims, fcntl.LOCK_EX, 1, self.blocks)
        try:
            if self._on_disk().complete:
                return np.empty(0, np.int64)
            missing = self.store.embeddings.missing()
            if not len(missing):
                self._writer.sync()
                files = self.store.manifest.files | {STATISTICS: _write_statistics(self.store)}
                write_manifest(self.store.folder, replace(self.store.manifest, complete=True, files=files))
            return missing
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, self.blocks)

    def finish(self) -> None:
        """Completes a store that has been filled. Raises ValueError if it did not keep what was written."""
        if count := len(self.complete()):
            raise ValueError(
                f"{self.store.folder} does not keep what is written: {count:,} embeddings are damaged again; "
                "look at its disk, then run the same command"
            )

    def _on_disk(self) -> TargetManifest:
        with embed_hint(self.store.folder, self.store.prepared):
            return read_manifest(self.store.folder, TargetManifest)


def _write_statistics(store: TargetStore) -> FileRecord:
    """Writes mean and standard deviation of the embeddings as they are stored, in fp16."""
    statistics = statistics_of(store.embeddings.vectors)
    temporary = store.folder / f".{STATISTICS}.partial"
    with FlatWriter(temporary, np.float32) as file:
        file.append(statistics.mean)
        file.append(statistics.std)
        record = file.finish()
    temporary.replace(store.folder / STATISTICS)
    return record
