"""The reference store of a prepared folder: what a frozen model predicts for each supervised token.

- manifest.json: the model, the prepared folder's contents, counts
- token.bin (int32 [n, K]): the K most likely tokens at each supervised token, the most likely first
- log_p.bin (fp32 [n, K + 1]): ln of their probabilities, and last that of all other tokens together
- offsets.bin (int64 [samples + 1]): the first supervised token of each sample

The first token of a sample is never predicted, so it is not among the n supervised tokens even where its mask is 1.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_sfr.data.prepared.conversations import PreparedData, PreparedManifest
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
from megatron_sfr.storage.manifest import is_of_kind, read_manifest

DEFAULT = "reference"
"""The folder of a store inside its prepared folder."""
LARGEST_LOG_P = 1e-3
"""Bound of a stored ln p, which rounding may raise above 0."""
DTYPES: dict[str, type[np.generic]] = {"token.bin": np.int32, "log_p.bin": np.float32, "offsets.bin": np.int64}


@dataclass(frozen=True)
class ReferenceIdentity:
    """What decides the bytes of a store."""

    model: str
    """Folder of the model, for information; `model_sha256` identifies it."""
    model_sha256: str
    """SHA-256 of the model's configuration and weights."""
    dtype: str
    """Data type of the model's computation. Probabilities are computed in fp32."""
    top_k: int
    batch_size: int
    """Sequences of a batch, whose shape affects rounding."""
    vocab_size: int
    """Columns of the model's logits."""
    data_sha256: dict[str, str]
    """Of the prepared folder's files that decide the supervised tokens; see `supervised_sha256`."""


@dataclass(frozen=True)
class ReferenceManifest(ReferenceIdentity):
    """What a store holds."""

    kind: ClassVar[str] = "a reference store"
    version: ClassVar[int] = 1

    samples: int
    supervised_tokens: int
    files: dict[str, FileRecord]


def supervised_sha256(manifest: PreparedManifest) -> dict[str, str]:
    """The checksums of the files of a prepared folder that decide its supervised tokens and what precedes them."""
    return {name: manifest.files[name]["sha256"] for name in ("tokens.bin", "mask.bin", "offsets.bin")}


class ReferenceStore:
    """A reference store, memory-mapped. `open` checks the manifest and sizes, `check` offsets and some checksums."""

    def __init__(self, folder: Path, prepared: PreparedData, manifest: ReferenceManifest) -> None:
        self.folder, self.prepared, self.manifest = folder, prepared, manifest
        n, K = manifest.supervised_tokens, manifest.top_k
        self._token = map_flat(folder / "token.bin", np.int32).reshape(n, K)
        self._log_p = map_flat(folder / "log_p.bin", np.float32).reshape(n, K + 1)
        self._offsets = map_flat(folder / "offsets.bin", np.int64)
        self._repair = reference_hint(folder, prepared, manifest)

    @classmethod
    def open(cls, folder: Path, prepared: PreparedData) -> ReferenceStore:
        """Opens a store. Raises ValueError if it is missing or damaged, or belongs to other conversations."""
        with reference_hint(folder, prepared):
            manifest = read_manifest(folder, ReferenceManifest)
        with reference_hint(folder, prepared, manifest):
            if manifest.data_sha256 != supervised_sha256(prepared.manifest):
                raise StoredFileError(
                    f"{folder} is stale: it was made for other conversations, or another tokenizer, than "
                    f"{prepared.folder} holds now (prepared again since?)"
                )
            check_sizes(folder, manifest.files)
            check_counts(folder, manifest.files, _bytes_of(manifest))
        return cls(folder, prepared, manifest)

    def check(self, budget: int = SAMPLE_BYTES) -> None:
        """Checks offsets, and checksums of `budget` bytes of files. Raises ValueError."""
        with self._repair:
            check_offsets(self.folder / "offsets.bin", self._offsets, self.manifest.supervised_tokens)
            check_sample(self.folder, self.manifest.files, budget)

    def verify(self) -> None:
        """Reads all bytes. Raises ValueError if one is not what was written."""
        with self._repair:
            check_contents(self.folder, self.manifest.files)

    def __len__(self) -> int:
        return self.manifest.samples

    def arrays(self, samples: Sequence[int], loss_mask_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the reference predicts at each position of a sequence: int32 [S, K] and fp32 [S, K + 1].

        Args:
            samples: the samples of the sequence, in order.
            loss_mask_S: which positions predict a supervised token. At others all values are 0.
        """
        spans = [slice(*self._offsets[i : i + 2].tolist()) for i in samples]
        position = np.flatnonzero(loss_mask_S)
        token_TK, log_p_TN = (np.concatenate([rows[span] for span in spans]) for rows in (self._token, self._log_p))
        with self._repair:
            if len(position) != len(token_TK):
                refuse(self.folder / "offsets.bin", f"samples {list(samples)} have other numbers of supervised tokens")
            if (token_TK < 0).any() or (token_TK >= self.manifest.vocab_size).any():
                refuse(self.folder / "token.bin", f"a token of samples {list(samples)} is out of range")
            if not (log_p_TN <= LARGEST_LOG_P).all():
                refuse(self.folder / "log_p.bin", f"a probability of samples {list(samples)} is above 1")
        token_SK, log_p_SN = (np.zeros((len(loss_mask_S), x.shape[1]), x.dtype) for x in (token_TK, log_p_TN))
        token_SK[position], log_p_SN[position] = token_TK, log_p_TN
        return token_SK, log_p_SN

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again: pickling a memory map would copy all of it.
        return ReferenceStore.open, (self.folder, self.prepared)


def is_reference_store(folder: Path) -> bool:
    """Whether a folder holds a complete reference store, of any version."""
    return is_of_kind(folder, ReferenceManifest)


def check_references(folders: Sequence[Path], store: str, vocab_size: int) -> None:
    """Checks the reference stores of a run. Raises ValueError if one is missing or damaged, or if they do not agree."""
    stores = [ReferenceStore.open(folder / store, PreparedData.open(folder)) for folder in folders]
    first = stores[0].manifest
    for found in stores:
        found.check(SAMPLE_BYTES // len(stores))
        manifest = found.manifest
        if manifest.vocab_size != vocab_size:
            raise ValueError(
                f"{found.folder} has probabilities over {manifest.vocab_size} tokens, and vocab_size is {vocab_size}: "
                "make it with the model that training starts from"
            )
        if (manifest.model_sha256, manifest.top_k) != (first.model_sha256, first.top_k):
            raise ValueError(
                f"{found.folder} and {stores[0].folder} are of different models or numbers of tokens: make both by "
                "the same `megatron-sfr reference --model DIR --top-k K`"
            )


def reference_hint(folder: Path, prepared: PreparedData, old: ReferenceManifest | None = None) -> hint:
    """A hint with the command that makes the store, with the model and the number of tokens of `old` if it is known."""
    words = ["megatron-sfr", "reference", "--data", str(prepared.folder), "--model", old.model if old else "HF_DIR"]
    words += ["--output", str(folder)] if folder != prepared.folder / DEFAULT else []
    words += ["--top-k", str(old.top_k), "--force"] if old else []
    return hint(f"run: {shlex.join(words)}")


def _bytes_of(manifest: ReferenceManifest) -> dict[str, int]:
    """The size of each file that the manifest's counts imply."""
    n, k = manifest.supervised_tokens, manifest.top_k
    elements = {"token.bin": n * k, "log_p.bin": n * (k + 1), "offsets.bin": manifest.samples + 1}
    return {name: count * np.dtype(DTYPES[name]).itemsize for name, count in elements.items()}
