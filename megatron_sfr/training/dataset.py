"""Prepared conversations as one of upstream's datasets, so that upstream blends, samples and resumes them.

An item is a row of S tokens (S sequence length): one conversation, or several that are packed into it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.horizons import horizons_of
from megatron_sfr.data.packing import Rows, deal, first_fit_decreasing
from megatron_sfr.data.prepared import PreparedData, Sample
from megatron_sfr.data.targets import TargetStore
from megatron_sfr.runtime.parallel import is_last_stage
from megatron_sfr.training.anchor_arrays import AnchorSizes, Fill, anchor_arrays, anchor_sizes, join_anchors, padded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """Where the targets of the flow-matching loss are, and which positions have them."""

    sfr: bool = False
    """Train with the flow head; without it the run is plain cross-entropy on the same data."""
    sfr_target_store: str = "targets"
    """Folder of the target store inside each prepared data folder; written by `megatron-sfr embed`."""
    sfr_packing: Literal["none", "first_fit_decreasing"] = "none"
    """Whether a row of seq_length tokens holds one conversation, padded, or as many as fit; attention and positions
    begin anew with each conversation. micro_batch_size and global_batch_size count rows."""
    sfr_anchors: Literal["anchors_only", "nearest"] = "anchors_only"
    """'anchors_only': each target where it begins; 'nearest': every position of a reply has the target of the nearest
    anchor, as in the authors' code, some tokens of which it may have read already."""


@dataclass
class PreparedDatasetConfig(BlendedMegatronDatasetConfig):
    """Upstream's dataset configuration; the store to read in each prepared folder (None: no targets), and how."""

    target_store: str | None = None
    fill: Fill = "anchors_only"
    sizes: AnchorSizes = field(default_factory=AnchorSizes)  # of the whole run: rows of all folders are collated
    packed: bool = False


class PreparedDataset(MegatronDataset):
    """One prepared folder, for as many epochs as were asked for; each training epoch deals its rows anew."""

    def __init__(
        self,
        dataset: PreparedData,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: PreparedDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.targets = None
        if config.target_store is not None:
            assert dataset_path is not None, "prepared data always has a path"
            self.targets = TargetStore.open(Path(dataset_path) / config.target_store, dataset)
        self.lengths = dataset.lengths[indices] if config.packed else np.ones(len(indices), np.int64)
        self.rows = first_fit_decreasing(self.lengths, config.sequence_length if config.packed else 1)
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        if config.packed and len(indices):
            full = self.lengths.sum() / (len(self.rows) * config.sequence_length)
            packed = f"{len(indices):,} conversations in {len(self.rows):,} rows, {full:.1%} full"
            log_single_rank(logger, logging.INFO, f"> {dataset_path} ({index_split.name}): {packed}")

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: PreparedData) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PreparedDatasetConfig) -> PreparedData:
        prepared = PreparedData.open(Path(dataset_path))
        if prepared.manifest.seq_length > config.sequence_length:
            raise ValueError(
                f"{dataset_path} was prepared for sequences of {prepared.manifest.seq_length} tokens, the recipe's "
                f"seq_length is {config.sequence_length}: raise it, or prepare again with --seq-length"
            )
        return prepared

    def _epoch(self, epoch: int) -> Rows:
        """Rows of places in `indices`."""
        if self.index_split is not Split.train:
            return self.rows
        return deal(self.rows, self.lengths, np.random.default_rng([self.config.random_seed, epoch]))

    def __len__(self) -> int:
        return max(self.num_samples or 0, len(self.rows))

    def conversations(self, idx: int) -> tuple[int, np.ndarray]:
        """The epoch that row idx of the whole run is of, and its conversations: indices into the prepared folder."""
        epoch, place = divmod(int(idx), len(self.rows))
        return epoch, self.indices[self.epoch(epoch)[place]]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Row idx of the whole run: arrays of fixed shapes.

        What keys an anchor's noise is its conversation and epoch: packing and order do not change it.
        """
        epoch, conversations = self.conversations(idx)
        samples = [self.dataset[int(i)] for i in conversations]
        item: dict[str, Any] = dict(row_arrays(samples, self.config.sequence_length))
        if not self.config.packed:
            del item["document"]
        if self.targets is not None:
            keys = epoch * len(self.dataset) + conversations
            row = join_anchors([sample.anchors for sample in samples], keys, row_starts(samples)[:-1])
            item |= anchor_arrays(row, self.config.fill, self.config.sizes)
            item["target"] = padded(self.targets[row.anchors.segment], self.config.sizes.rows, np.float16)
        return item


def row_starts(samples: Sequence[Sample]) -> np.ndarray:
    """Where each sample begins in their row, and where the last one ends: int64 [n + 1]."""
    return np.cumsum([0, *(len(sample.tokens) - 1 for sample in samples)])


def row_arrays(samples: Sequence[Sample], length: int) -> dict[str, np.ndarray]:
    """Samples to upstream's arrays [S] and `document`, which counts them from 0; all of them fit.

    Labels are the next tokens; padding, a document of its own, is masked out.
    """
    starts = row_starts(samples)
    row = {name: np.zeros(length, np.int64) for name in ("tokens", "labels", "position_ids", "document")}
    loss_mask = np.zeros(length, np.float32)
    for number, (sample, start, end) in enumerate(zip(samples, starts[:-1], starts[1:], strict=True)):
        row["tokens"][start:end], row["labels"][start:end] = sample.tokens[:-1], sample.tokens[1:]
        loss_mask[start:end] = sample.loss_mask[1:]
        row["document"][start:end], row["position_ids"][start:end] = number, np.arange(end - start)
    rest = length - starts[-1]
    row["document"][starts[-1] :], row["position_ids"][starts[-1] :] = len(samples), np.arange(rest)
    return row | {"loss_mask": loss_mask}


def dataset_config(args: Any) -> PreparedDatasetConfig:
    """Upstream's configuration; with SFR, also the sizes that fit every folder of train, valid and test."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = PreparedDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        full_validation=args.full_validation,
        packed=args.sfr_packing != "none",
    )
    if args.sfr:
        paths = [path for part in (blend, *(blend_per_split or ())) if part is not None for path in part[0]]
        horizons_of(paths)  # one head has the horizons of all
        config.target_store, config.fill = args.sfr_target_store, args.sfr_anchors
        folders, capacity = (
            [PreparedData.open(Path(path)) for path in paths],
            args.seq_length if config.packed else None,
        )
        config.sizes = anchor_sizes(folders, args.sfr_anchors, capacity)
    return config


def build_datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
    """Upstream's train_valid_test_datasets_provider, for every rank; only the last stage has targets to read."""
    config = dataset_config(get_args())
    if not is_last_stage(vp_stage):
        config.target_store = None
    return BlendedMegatronDatasetBuilder(PreparedDataset, list(num_samples), lambda: True, config).build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # upstream: every rank opens its own memory map
