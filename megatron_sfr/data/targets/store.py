"""The target store: an fp16 embedding of each distinct segment of a prepared folder, memory-mapped, with its checksum.

- manifest.json: the encoder, the segments, and whether the store is complete
- vectors.bin, checksums.bin: see vectors.py
- segment_digests.bin (uint8 [segments, 16]): digests of the texts, by which another store can copy embeddings from here
- copied.bin (uint8 [segments]): 1 if the embedding was copied from another store
- statistics.bin (fp32 [2, D]): mean and population standard deviation of each dimension; once the store is complete
- claims.lock: empty; see fill.py
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_sfr.data.prepared.segment_texts import HasSegments
from megatron_sfr.data.targets.vectors import VECTORS, Embeddings, row_sizes
from megatron_sfr.storage.integrity import FileRecord, StoredFileError, check_contents, check_size, check_sizes, hint
from megatron_sfr.storage.manifest import NAME, is_of_kind, read_manifest

DEFAULT = "targets"  # the folder of a store inside its prepared folder
DIGESTS = "segment_digests.bin"  # the same name as in prepared folders
COPIED = "copied.bin"
STATISTICS = "statistics.bin"


@dataclass(frozen=True)
class EncoderIdentity:
    """What determines the embedding of a text, up to rounding."""

    encoder: str
    """The encoder's name in the command."""
    revision: str | None
    """Name and revision are for information; `encoder_sha256` identifies the encoder."""
    encoder_sha256: str
    """SHA-256 of the encoder's weights and tokenizer."""
    pooling: str
    normalize: str
    prompt: str
    """Put before each text."""
    max_length: int
    """In tokens of the encoder; the rest of a segment is not read."""
    dtype: str
    """Data type of the encoder's computation."""
    dim: int


@dataclass(frozen=True)
class StoreIdentity(EncoderIdentity):
    """What determines every bit of an embedding: also which texts share a batch, as its shape affects rounding."""

    batch_size: int
    block_rows: int


@dataclass(frozen=True)
class TargetManifest(StoreIdentity):
    """Which embeddings of which segments a store holds, and whether it is complete."""

    kind: ClassVar[str] = "a target store"
    version: ClassVar[int] = 3

    segments: int
    segments_sha256: str
    """SHA-256 of segments.jsonl in the prepared folder."""
    complete: bool
    files: dict[str, FileRecord]
    """Files that do not change while the store is filled."""


def differences(old: EncoderIdentity, new: EncoderIdentity) -> list[str]:
    """The fields of `new` that determine embeddings and differ in `old`; the encoder's name does not count."""
    deciding = {name: value for name, value in asdict(new).items() if name not in ("encoder", "revision")}
    return sorted(name for name, value in deciding.items() if getattr(old, name) != value)


class TargetStore:
    """Embeddings by segment. `open` checks the manifest and sizes, every read its embeddings, `verify` all bytes.

    Example:
        >>> import megatron_sfr as sfr
        >>> data = sfr.open_prepared("prepared")
        >>> store = sfr.TargetStore.open("prepared/targets", data)
        >>> vectors = store[data[0].anchors.segment]  # those of a sample's anchors: fp16 [A, D]
        >>> vectors.shape == (len(data[0].anchors.segment), store.dim)
        True
    """

    def __init__(self, folder: Path, prepared: HasSegments, manifest: TargetManifest) -> None:
        self.folder = folder
        self.prepared = prepared
        self.manifest = manifest
        self.dim = manifest.dim
        self.embeddings = Embeddings(folder, manifest.dim)
        self._repair = embed_hint(folder, prepared, manifest, "--verify")
        self._statistics = None
        if manifest.complete:
            self._statistics = np.fromfile(folder / STATISTICS, np.float32).reshape(2, manifest.dim)
            self._statistics.flags.writeable = False

    @classmethod
    def open(cls, folder: str | Path, prepared: HasSegments, *, partial: bool = False) -> TargetStore:
        """Opens a store.

        Args:
            folder: the store.
            prepared: the prepared folder whose segments it holds.
            partial: accept a store that is not complete.
        Raises:
            ValueError: the store is missing, truncated or not complete, or belongs to other segments.
        """
        folder = Path(folder)
        with embed_hint(folder, prepared):
            manifest = read_manifest(folder, TargetManifest)
        with embed_hint(folder, prepared, manifest):
            if manifest.segments_sha256 != prepared.manifest.segments_sha256:
                raise StoredFileError(
                    f"{folder} is stale: it holds embeddings of other segments than {prepared.folder} has now "
                    "(prepared again since?)"
                )
        with embed_hint(folder, prepared, manifest, "--verify"):
            check_files(folder, manifest)
        store = cls(folder, prepared, manifest)
        if not (manifest.complete or partial):
            begun = np.count_nonzero(store.embeddings.begun(slice(None)))
            with embed_hint(folder, prepared, manifest):
                raise StoredFileError(f"{folder} is not complete: it has {begun:,} of {len(store):,} targets")
        return store

    @property
    def mean(self) -> np.ndarray:
        """float32 [D], read-only: mean over distinct segments. Raises ValueError if the store is not complete."""
        return self._statistic(0)

    @property
    def std(self) -> np.ndarray:
        """float32 [D], read-only: population standard deviation over distinct segments."""
        return self._statistic(1)

    def _statistic(self, index: int) -> np.ndarray:
        if self._statistics is None:
            with embed_hint(self.folder, self.prepared, self.manifest):
                raise StoredFileError(f"{self.folder} has no statistics before it is complete")
        return self._statistics[index]

    def verify(self) -> None:
        """Reads all bytes. Raises ValueError if one is not what was written; missing embeddings are not an error."""
        with self._repair:
            check_contents(self.folder, self.manifest.files)
            bad = self.embeddings.missing()
            self._refuse(bad if self.manifest.complete else bad[self.embeddings.begun(bad)])

    def __len__(self) -> int:
        return self.manifest.segments

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of rows, fp16 [len(rows), dim], a copy. Raises ValueError if one is missing or damaged."""
        vectors, good = self.embeddings.read(rows)
        with self._repair:
            self._refuse(rows[~good])
        return vectors

    def _refuse(self, rows: np.ndarray) -> None:
        if len(rows):
            more = f" and {len(rows) - 1:,} more are" if len(rows) > 1 else " is"
            raise StoredFileError(f"{self.folder}: embedding {rows[0]}{more} missing or damaged (the checksum differs)")

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again: pickling a memory map would copy all of it.
        return _open, (self.folder, self.prepared, not self.manifest.complete)


def _open(folder: Path, prepared: HasSegments, partial: bool) -> TargetStore:
    return TargetStore.open(folder, prepared, partial=partial)


def is_store(folder: Path) -> bool:
    """Whether a folder is a target store, of any version and in any state."""
    return is_of_kind(folder, TargetManifest) or (folder / VECTORS).exists()


def check_files(folder: Path, manifest: TargetManifest) -> None:
    """Checks the sizes of all files and the content of the statistics. Raises StoredFileError."""
    check_sizes(folder, manifest.files)
    for name, size in row_sizes(manifest.segments, manifest.dim).items():
        check_size(folder / name, size)
    check_contents(folder, {name: manifest.files[name] for name in manifest.files.keys() & {STATISTICS}})


def embed_hint(folder: Path, prepared: HasSegments, old: TargetManifest | None = None, flag: str = "") -> hint:
    """A hint with the command that makes the store, with the options of `old` if it is known."""
    words = ["megatron-sfr", "embed", "--data", str(prepared.folder)]
    if folder != prepared.folder / DEFAULT:
        words += ["--output", str(folder)]
    if old is None:
        words += ["--encoder", "ENCODER", *(["--force"] if (folder / NAME).exists() else [])]
    else:
        words += ["--encoder", old.encoder, "--pooling", old.pooling]
        words += ["--revision", old.revision] if old.revision else []
        words += ["--normalize", old.normalize] if old.normalize != "unit" else []
        words += ["--prompt", old.prompt] if old.prompt else []
        words += ["--max-length", str(old.max_length)] if old.max_length else []
        words += ["--dtype", old.dtype, "--batch-size", str(old.batch_size), "--block-rows", str(old.block_rows)]
    return hint(f"run: {shlex.join([*words, *([flag] if flag else [])])}")
