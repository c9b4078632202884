"""A pretraining corpus in upstream's GPTDataset, with the anchors of the documents in each sequence.

Upstream shuffles and concatenates documents and cuts the result into sequences of S + 1 tokens (S sequence length), so
a piece of a document may start and end anywhere. An anchor's future follows its document, also past the sequence's end.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_sfr.data.prepared.conversations import Anchors
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.training.data.anchor_arrays import (
    AnchorPlan,
    AnchorSizes,
    EntryOptions,
    SequenceAnchors,
    TargetReader,
)


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Upstream's dataset configuration, with the options of prepared documents."""

    separate: bool = False
    """Whether attention stays within documents."""
    anchors: AnchorPlan | None = None
    """How to build the anchors' arrays; None: items have no anchors."""
    contents: dict[str, str] = field(default_factory=dict)
    """Hashes of the prepared folders, part of the key of upstream's cached indices."""
    text_length: int | None = None
    """Tokens of a text in KL-flow training; None for other training tasks."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of documents that form a sequence of S + 1 tokens; int64 [n] each."""

    document: np.ndarray
    """Number of the document."""
    begin: np.ndarray
    """First token of the document in the sequence."""
    end: np.ndarray
    """End (exclusive) of the document's tokens in the sequence."""
    start: np.ndarray
    """Position in the sequence where the piece starts."""


class DocumentDataset(GPTDataset):
    """Upstream's sequences; `item["document"]` numbers the pieces of a sequence from 0."""

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: DocumentDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        assert dataset_path is not None, "prepared documents always have a path"
        self.prepared = PreparedDocuments.open(Path(dataset_path))
        self.targets = TargetReader(self.prepared, config.anchors) if config.anchors is not None else None
        self.anchor_sizes: AnchorSizes | None = None
        """Size of the items' anchor arrays. `provider.build` sets it when all datasets of the run are built."""
        self.groups: dict[str, int] = {}
        """The number of the documents' group, under ""; empty: items have no `group`."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        prepared = PreparedDocuments.open(Path(dataset_path))
        return GPTDataset.build_low_level_dataset(prepared.corpus, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "contents"]

    def pieces(self, idx: int) -> Pieces:
        """The pieces of sequence `idx` of the run, as in upstream's `_query_document_sample_shuffle_indices`."""
        row = self.shuffle_index[idx]
        (first, offset), (last, extra) = (self.sample_index[i].astype(np.int64) for i in (row, row + 1))
        document = self.document_index[first : last + 1].astype(np.int64)
        begin = np.zeros_like(document)
        end = self.dataset.sequence_lengths[document].astype(np.int64)
        begin[0], end[-1] = offset, min(end[-1], extra + 1)
        return Pieces(document, begin, end, np.cumsum(end - begin) - (end - begin))

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        item: dict[str, Any] = super().__getitem__(idx)
        if self.config.text_length is not None:
            item["sample"] = 0 if idx is None else int(idx)
        if self.groups:
            item["group"] = np.full(self.config.sequence_length, self.groups[""], np.int32)
        if self.config.separate or self.targets is not None:
            pieces = self.pieces(0 if idx is None else int(idx))
            if self.config.separate:
                place = np.arange(self.config.sequence_length)
                item["document"] = np.searchsorted(pieces.start, place, side="right") - 1
                item["position_ids"] = place - pieces.start[item["document"]]
            if self.targets is not None:
                assert self.anchor_sizes is not None, "provider.build sets anchor_sizes"
                item |= self.targets.arrays(self._anchors(pieces, 0 if idx is None else int(idx)), self.anchor_sizes)
        return item

    def _anchors(self, pieces: Pieces, idx: int) -> SequenceAnchors:
        """Treats each piece as a response of constant weight. Its last token has no next token to predict."""
        columns = []
        for number, (document, begin, end, start) in enumerate(
            zip(pieces.document, pieces.begin, pieces.end, pieces.start, strict=True)
        ):
            position, segment, horizon = self.prepared.anchors(document, begin, end - 1)
            ordinal, same = position - begin, np.ones_like(position)
            columns.append((start + ordinal, segment, number * same, ordinal, (end - begin - 1) * same, horizon))
        anchors = Anchors(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        zero = np.zeros_like(anchors.position)
        return SequenceAnchors(anchors, zero + idx, zero, falling=False)

    def segments(self, idx: int) -> tuple[int, np.ndarray]:
        """Number of the prepared folder, and the segments whose embeddings sequence `idx` reads from it."""
        assert self.targets is not None
        assert self.targets.number is not None
        return self.targets.number, self._anchors(self.pieces(idx), idx).anchors.segment

    def sizes(self, options: EntryOptions) -> AnchorSizes:
        """Bounds on the anchors of any sequence. A piece of n predictions has at most ceil(n / stride) per horizon."""
        manifest, length = self.prepared.manifest, self.config.sequence_length
        pieces = 1 + int((self.sample_index[1:, 0] - self.sample_index[:-1, 0]).max(initial=0))
        horizons = len(manifest.horizons)
        rows = horizons * ((length + pieces * (manifest.stride - 1)) // manifest.stride)
        return AnchorSizes(rows, rows if options.fill == "anchors_only" else length * horizons)


def documents_sha256(prepared: PreparedDocuments) -> str:
    """A hash of a prepared folder's corpus and anchors."""
    manifest = prepared.manifest
    parts = [*(record["sha256"] for record in manifest.inputs), *(f["sha256"] for f in manifest.files.values())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
