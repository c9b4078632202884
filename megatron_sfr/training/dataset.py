"""Prepared conversations as one of upstream's datasets, so that upstream blends, samples and resumes them.

Letters: S sequence length.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.horizons import horizons_of
from megatron_sfr.data.prepared import PreparedData
from megatron_sfr.data.targets import TargetStore
from megatron_sfr.training.anchor_arrays import AnchorSizes, Fill, anchor_arrays, anchor_sizes


@dataclass(frozen=True)
class DataOptions:
    """Where the targets of the flow-matching loss are, and which positions have them."""

    sfr: bool = False
    """Train with the flow head; without it the run is plain cross-entropy on the same data."""
    sfr_target_store: str = "targets"
    """Folder of the target store inside each prepared data folder; written by `megatron-sfr embed`."""
    sfr_anchors: Literal["anchors_only", "nearest"] = "anchors_only"
    """'anchors_only': each target where it begins; 'nearest': every position of a reply has the target of the nearest
    anchor, as in the authors' code, some tokens of which it may have read already."""


@dataclass
class PreparedDatasetConfig(BlendedMegatronDatasetConfig):
    """Upstream's dataset configuration; the store to read in each prepared folder (None: no targets), and how."""

    target_store: str | None = None
    fill: Fill = "anchors_only"
    sizes: AnchorSizes = field(default_factory=AnchorSizes)  # of the whole run: samples of all folders are collated


class PreparedDataset(MegatronDataset):
    """One prepared folder, for as many epochs as were asked for; each training epoch in an order of its own."""

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
        self.order = lru_cache(maxsize=2)(self._order)

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

    def _order(self, epoch: int) -> np.ndarray:
        if self.index_split is not Split.train:
            return self.indices
        return np.random.default_rng([self.config.random_seed, epoch]).permutation(self.indices)

    def __len__(self) -> int:
        return max(self.num_samples or 0, len(self.indices))

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample idx of the whole run: arrays of fixed shapes, and idx itself, which keys the noise."""
        epoch, place = divmod(int(idx), len(self.indices))
        sample = self.dataset[int(self.order(epoch)[place])]
        item: dict[str, Any] = dict(pad_sample(sample.tokens, sample.loss_mask, self.config.sequence_length))
        if self.targets is not None:
            item |= anchor_arrays(sample.anchors, self.targets, self.config.fill, self.config.sizes)
            item["sample_index"] = np.int64(idx)
        return item


def pad_sample(tokens: np.ndarray, loss_mask: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Tokens [n <= S + 1] to upstream's arrays [S]; labels are the next tokens, padding is masked out."""
    n = len(tokens) - 1
    padded = np.zeros(length + 1, dtype=np.int64)
    padded[: n + 1] = tokens
    mask = np.zeros(length, dtype=np.float32)
    mask[:n] = loss_mask[1:]
    return {
        "tokens": padded[:-1].copy(),
        "labels": padded[1:].copy(),
        "loss_mask": mask,
        "position_ids": np.arange(length, dtype=np.int64),
    }


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
    )
    if args.sfr:
        paths = [path for part in (blend, *(blend_per_split or ())) if part is not None for path in part[0]]
        horizons_of(paths)  # one head has the horizons of all
        config.target_store, config.fill = args.sfr_target_store, args.sfr_anchors
        config.sizes = anchor_sizes([PreparedData.open(Path(path)).manifest for path in paths], args.sfr_anchors)
    return config


def build_datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
    """Upstream's train_valid_test_datasets_provider, for every rank."""
    del vp_stage  # each virtual stage reads the same samples
    config = dataset_config(get_args())
    return BlendedMegatronDatasetBuilder(PreparedDataset, list(num_samples), lambda: True, config).build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # upstream: every rank opens its own memory map
