"""A pretraining corpus as upstream's GPTDataset cuts it, with the anchors of the documents that a row holds pieces of.

Upstream shuffles documents, joins them and cuts the whole into rows of S + 1 tokens (S sequence length), so a piece may
begin and end anywhere in its document. The future of an anchor is its document's, also where the row ends before it.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_sfr.data.documents import PreparedDocuments
from megatron_sfr.data.prepared import Anchors
from megatron_sfr.training.anchor_arrays import AnchorPlan, AnchorSizes, Fill, RowAnchors, TargetReader


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Upstream's dataset configuration, whether attention is kept inside documents, and what anchors become (None:
    nothing). `contents` stands for the bytes of all folders: upstream finds its cached indices by it. For KL-flow
    text_length says how many tokens of a row its texts have (None: rows are not for KL-flow)."""

    separate: bool = False
    anchors: AnchorPlan | None = None
    contents: dict[str, str] = field(default_factory=dict)
    text_length: int | None = None


@dataclass(frozen=True)
class Pieces:
    """The parts of documents that a row of S + 1 tokens joins; int64 [n] each.

    document  number of the document
    begin     its first token in the row
    end       behind its last token in the row
    start     where in the row it begins
    """

    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    start: np.ndarray


class DocumentDataset(GPTDataset):
    """Upstream's rows; `item["document"]` counts the pieces of a row from 0."""

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

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        prepared = PreparedDocuments.open(Path(dataset_path))
        return GPTDataset.build_low_level_dataset(prepared.corpus, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "contents"]

    def pieces(self, idx: int) -> Pieces:
        """What row idx of the whole run is made of, as `_query_document_sample_shuffle_indices` reads it."""
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
        if self.config.separate or self.targets is not None:
            pieces = self.pieces(0 if idx is None else int(idx))
            if self.config.separate:
                place = np.arange(self.config.sequence_length)
                item["document"] = np.searchsorted(pieces.start, place, side="right") - 1
                item["position_ids"] = place - pieces.start[item["document"]]
            if self.targets is not None:
                item |= self.targets.arrays(self._anchors(pieces, 0 if idx is None else int(idx)))
        return item

    def _anchors(self, pieces: Pieces, idx: int) -> RowAnchors:
        """A piece is a response whose positions weigh alike. The last token of a piece predicts nothing of it."""
        columns = []
        for number, (document, begin, end, start) in enumerate(
            zip(pieces.document, pieces.begin, pieces.end, pieces.start, strict=True)
        ):
            position, segment, horizon = self.prepared.anchors(document, begin, end - 1)
            ordinal, same = position - begin, np.ones_like(position)
            columns.append((start + ordinal, segment, number * same, ordinal, (end - begin - 1) * same, horizon))
        anchors = Anchors(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        zero = np.zeros_like(anchors.position)
        return RowAnchors(anchors, zero + idx, zero, falling=False)

    def segments(self, idx: int) -> tuple[int, np.ndarray]:
        """The rows of targets that row idx reads, and the number of the folder that they are of."""
        assert self.targets is not None
        assert self.targets.number is not None
        return self.targets.number, self._anchors(self.pieces(idx), idx).anchors.segment

    def sizes(self, fill: Fill) -> AnchorSizes:
        """What fits the anchors of every row: a piece of n predictions has at most ceil(n / stride) at each horizon."""
        manifest, length = self.prepared.manifest, self.config.sequence_length
        pieces = 1 + int((self.sample_index[1:, 0] - self.sample_index[:-1, 0]).max(initial=0))
        horizons = len(manifest.horizons)
        rows = horizons * ((length + pieces * (manifest.stride - 1)) // manifest.stride)
        return AnchorSizes(rows, rows if fill == "anchors_only" else length * horizons)


def contents_of(prepared: PreparedDocuments) -> str:
    """Stands for the corpus and the anchors of a folder."""
    manifest = prepared.manifest
    parts = [*(record["sha256"] for record in manifest.inputs), *(f["sha256"] for f in manifest.files.values())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
