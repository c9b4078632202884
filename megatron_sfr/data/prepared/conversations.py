"""Prepared folders of conversations: tokens, loss masks and anchors, memory-mapped and read-only.

- manifest.json: written last
- tokens.bin (int32), mask.bin (uint8): all samples, concatenated; offsets.bin (int64 [samples + 1]) separates them
- personas.bin (int32 [samples]): index into the manifest's personas
- anchors.bin (int32 [anchors, 6]): the fields of `Anchors`; anchor_offsets.bin (int64 [samples + 1])
- segments.jsonl, segment_offsets.bin, segment_digests.bin: the distinct texts of segments; see segment_texts.py
- rejected.jsonl: records that --skip-bad-rows left out, with the reasons; never read again
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_sfr.data.prepared import segment_texts
from megatron_sfr.data.segments.reference_anchors import AnchorRule
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
    largest,
    refuse,
)
from megatron_sfr.storage.manifest import InputRecord, read_manifest

DTYPES: dict[str, type[np.generic]] = {
    "tokens.bin": np.int32,
    "mask.bin": np.uint8,
    "offsets.bin": np.int64,
    "personas.bin": np.int32,
    "anchors.bin": np.int32,
    "anchor_offsets.bin": np.int64,
    **segment_texts.DTYPES,
}


@dataclass(frozen=True)
class PreparedManifest:
    """Contents and origin of a prepared folder."""

    kind: ClassVar[str] = "prepared data"
    version: ClassVar[int] = 3

    samples: int
    tokens: int
    supervised_tokens: int
    max_response_tokens: int
    """The largest number of supervised tokens of a sample."""
    anchors: int
    """Number of anchors, each counted once for each horizon at which it has a target."""
    max_anchors: int
    """The largest number of anchors of a sample."""
    segments: int
    """Number of distinct segments."""
    rejected: int
    truncated: int
    """Samples cut at seq_length + 1 tokens."""
    duplicates: int
    """Samples with the token ids of an earlier one, which are kept."""
    personas: dict[str, int]
    """Samples by persona; "" for none."""
    persona_key: str
    seq_length: int
    too_long: str
    stride: int
    horizons: list[list[int]]
    """[offset, length] each, in units of the segmenter."""
    min_segment_length: int
    segmenter: Segmenter
    vocab_size: int
    """Number of tokens of the tokenizer, added ones included."""
    tokenizer: str
    tokenizer_sha256: str
    segments_sha256: str
    inputs: list[InputRecord]
    files: dict[str, FileRecord]
    max_token_id: int | None = None
    """The largest token id; None in folders of earlier releases."""
    reply_end_tokens: list[int] | None = None
    """Ids that end the replies; None in folders of earlier releases."""
    chat: dict[str, Any] | None = None
    """`SampleOptions`; None in folders of earlier releases."""
    conversations: int | None = None
    """Records, one or more samples each; None in folders of earlier releases."""
    unlike_last: int = 0
    """Replies without the empty thought that the last reply of their sample has."""
    unlike_inference: int = 0
    """Replies of --turns as-rendered that differ from what the model would write at inference."""
    anchor_rule: AnchorRule = "replies"
    """'reference': as in SFR's public code, with one response for all replies."""


@dataclass(frozen=True)
class Anchors:
    """Positions of one sample that have a target, once for each of its horizons; int32 [A] each.

    They are ordered by position, then horizon. With the manifest's anchor_rule = reference the replies of a sample are
    one response: token i itself is its token `ordinal`, which need not be contiguous with the next one, and the segment
    starts at token `ordinal` + o.
    """

    position: np.ndarray
    """Index i into the tokens: the hidden state at input position i is the condition, token i + 1 is supervised."""
    segment: np.ndarray
    """Index in the target store. The segment at horizon (o, L) is the text of L units of the segmenter, the first being
    the o-th from token i + 1 on (for tokens: i + o ... i + o + L - 1). It is cut at the end of the reply, which may lie
    beyond a truncated sample."""
    response: np.ndarray
    """Number of the trained reply in the sample, from 0."""
    ordinal: np.ndarray
    """Index of token i + 1 among the supervised tokens of its reply, from 0."""
    length: np.ndarray
    """Supervised tokens of that reply within the sample."""
    horizon: np.ndarray
    """Index of (o, L) among the manifest's horizons."""


@dataclass(frozen=True)
class Sample:
    """One conversation: tokens [n] int32 with n <= seq_length + 1, loss_mask [n] uint8 (1 = predict this token)."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    anchors: Anchors
    persona: str


class PreparedData:
    """The samples of a prepared folder.

    `open` checks the manifest and the sizes of files, reading a sample its ranges, `check` all offsets and some
    checksums, `verify` every byte.
    """

    def __init__(self, folder: Path, manifest: PreparedManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._personas = list(manifest.personas)
        self._tokens = self._map("tokens.bin")
        self._mask = self._map("mask.bin")
        self._offsets = self._map("offsets.bin")
        self._persona = self._map("personas.bin")
        self._anchors = self._map("anchors.bin").reshape(-1, 6)
        self._anchor_offsets = self._map("anchor_offsets.bin")
        self._repair = repair(folder)
        self.texts = segment_texts.SegmentTexts(folder, self._repair)

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """Opens a folder. Raises ValueError if it is incomplete, damaged or of another version."""
        folder = Path(folder)
        with repair(folder):
            manifest = read_manifest(folder, PreparedManifest)
            check_sizes(folder, manifest.files)
            check_counts(folder, manifest.files, _bytes_of(manifest))
        return cls(folder, manifest)

    def check(self, budget: int = SAMPLE_BYTES) -> None:
        """Checks offsets, and checksums of `budget` bytes of files, at the start of a run. Raises ValueError."""
        with self._repair:
            check_offsets(self.folder / "offsets.bin", self._offsets, self.manifest.tokens)
            check_offsets(self.folder / "anchor_offsets.bin", self._anchor_offsets, self.manifest.anchors)
            check_sample(self.folder, self.manifest.files, budget)

    @property
    def max_token_id(self) -> int:
        """The largest token id. Reads all tokens if an earlier release wrote the folder."""
        recorded = self.manifest.max_token_id
        return largest(self._tokens) if recorded is None else recorded

    def verify(self) -> None:
        """Reads every byte. Raises ValueError, with the file's name, if one is not what was written."""
        with self._repair:
            check_contents(self.folder, self.manifest.files)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return self._sample(index)
        except StoredFileError:
            with self._repair:  # adds how to repair the folder
                raise

    def _sample(self, index: int) -> Sample:
        start, end = self._bounds("offsets.bin", self._offsets, index, len(self._tokens))
        first, last = self._bounds("anchor_offsets.bin", self._anchor_offsets, index, len(self._anchors))
        self._check_ranges(index, int(end - start), self._anchors[first:last])
        # Copies: torch warns of read-only memory, and a sample is small.
        columns = self._anchors[first:last].T.copy()
        return Sample(
            tokens=self._tokens[start:end].copy(),
            loss_mask=self._mask[start:end].copy(),
            anchors=Anchors(*columns),
            persona=self._personas[self._persona[index]],
        )

    @property
    def positions(self) -> np.ndarray:
        """Input positions of each sample, int64 [n]: its tokens without the last, which is only predicted."""
        return np.diff(self._offsets) - 1

    @property
    def anchor_counts(self) -> np.ndarray:
        """Anchors of each sample, int64 [n]."""
        return np.diff(self._anchor_offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return np.diff(self._offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again: pickling would copy the memory maps.
        return PreparedData.open, (self.folder,)

    def _map(self, name: str) -> np.ndarray:
        return map_flat(self.folder / name, DTYPES[name])

    def _bounds(self, name: str, offsets: np.ndarray, index: int, total: int) -> tuple[int, int]:
        start, end = offsets[index : index + 2].tolist()
        if not 0 <= start <= end <= total:
            refuse(self.folder / name, f"sample {index} runs from {start} to {end} of {total}")
        return start, end

    def _check_ranges(self, index: int, tokens: int, anchors: np.ndarray) -> None:
        """Raises StoredFileError if the persona or an anchor of a sample is out of range; anchors [A, 6]."""
        if not 0 <= self._persona[index] < len(self._personas):
            refuse(self.folder / "personas.bin", f"sample {index} has an unknown persona")
        last = (tokens - 2, self.manifest.segments - 1, tokens - 1, tokens - 1, tokens, len(self.manifest.horizons) - 1)
        if (anchors < 0).any() or (anchors > last).any():
            refuse(self.folder / "anchors.bin", f"an anchor of sample {index} is out of range")


def _bytes_of(manifest: PreparedManifest) -> dict[str, int]:
    """The size of each file that the manifest's counts imply."""
    elements = {
        "tokens.bin": manifest.tokens,
        "mask.bin": manifest.tokens,
        "offsets.bin": manifest.samples + 1,
        "personas.bin": manifest.samples,
        "anchors.bin": manifest.anchors * 6,
        "anchor_offsets.bin": manifest.samples + 1,
    }
    return {name: n * np.dtype(DTYPES[name]).itemsize for name, n in elements.items()} | segment_texts.bytes_of(
        manifest
    )


def repair(folder: Path) -> hint:
    """A hint with the command that prepares a folder of conversations again."""
    return hint(f"run: megatron-sfr prepare --input FILE --tokenizer DIR --output {folder} --force")
