"""The target store: one fp16 row of length 1 for each distinct segment, memory-mapped, tied to its data by hash.

- manifest.json: written last
- vectors.bin (fp16 [segments, D])
- statistics.bin (fp32 [2, D]): mean and population standard deviation of each dimension over these rows
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_sfr.data.flat import map_flat
from megatron_sfr.data.manifest import NAME, FileRecord, check_contents, check_sizes, read_manifest
from megatron_sfr.data.texts import HasSegments

DEFAULT = "targets"  # the folder of a store inside its prepared folder
VECTORS = "vectors.bin"
STATISTICS = "statistics.bin"


@dataclass(frozen=True)
class EncoderIdentity:
    """What decides the embedding of a text."""

    encoder: str  # as it was named; `encoder_sha256` decides
    encoder_sha256: str  # of its weights and its tokenizer
    pooling: str
    max_length: int  # in the encoder's tokens; the rest of a segment is not read
    dtype: str  # of the encoder's computation
    dim: int


@dataclass(frozen=True)
class TargetManifest(EncoderIdentity):
    """Whose embeddings a store holds, of which segments."""

    kind: ClassVar[str] = "a target store"
    version: ClassVar[int] = 2

    segments: int
    segments_sha256: str  # of the prepared data they belong to
    files: dict[str, FileRecord]


class TargetStore:
    """Embeddings by segment row. `open` checks the manifest, the pair and the sizes, `verify` every byte.

    `mean` and `std` are float32 [D], read-only: of all rows, each distinct segment once.
    """

    def __init__(self, folder: Path, prepared: HasSegments, manifest: TargetManifest) -> None:
        self.folder = folder
        self.prepared = prepared
        self.manifest = manifest
        self.dim = manifest.dim
        self._vectors = map_flat(folder / VECTORS, np.float16).reshape(manifest.segments, manifest.dim)
        statistics = np.fromfile(folder / STATISTICS, np.float32).reshape(2, manifest.dim)
        statistics.flags.writeable = False
        self.mean, self.std = statistics

    @classmethod
    def open(cls, folder: Path, prepared: HasSegments) -> TargetStore:
        """ValueError where the store is missing, damaged, or belongs to other segments than `prepared` has."""
        folder = Path(folder)
        manifest = read_manifest(folder, TargetManifest, _remedy(folder, prepared))
        if manifest.segments_sha256 != prepared.manifest.segments_sha256:
            raise ValueError(
                f"{folder} is stale: it holds embeddings of other segments than {prepared.folder} has now "
                f"(prepared again since?); {_remedy(folder, prepared, manifest)}"
            )
        check_sizes(folder, manifest.files, _remedy(folder, prepared, manifest))
        return cls(folder, prepared, manifest)

    def verify(self) -> None:
        """Reads everything; ValueError where a byte is not what was written."""
        check_contents(self.folder, self.manifest.files, _remedy(self.folder, self.prepared, self.manifest))

    def __len__(self) -> int:
        return self.manifest.segments

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """fp16 [len(rows), dim], a copy."""
        return self._vectors[rows]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file again: pickling a memory map would copy all of it.
        return TargetStore.open, (self.folder, self.prepared)


def _remedy(folder: Path, prepared: HasSegments, old: TargetManifest | None = None) -> str:
    """The command that makes the store, again as it was made where that is known."""
    command = f"run: megatron-sfr embed --data {prepared.folder}"
    if folder != prepared.folder / DEFAULT:
        command += f" --output {folder}"
    if old is None:
        command += " --encoder ENCODER"
    else:
        length = f" --max-length {old.max_length}" if old.max_length else ""
        command += f" --encoder {old.encoder} --pooling {old.pooling}{length} --dtype {old.dtype}"
    return command + (" --force" if (folder / NAME).exists() else "")
