"""Prepared conversations as one of upstream's datasets, so that upstream blends, samples and resumes them.

Letters: S sequence length, A most anchors of a sample, D dimension of the embeddings.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_sfr.data.prepared import Anchors, PreparedData
from megatron_sfr.data.targets import TargetStore
from megatron_sfr.objectives.sfr import anchor_weights


@dataclass(frozen=True)
class DataOptions:
    """Where the targets of the flow-matching loss are."""

    sfr: bool = False
    """Train with the flow head; without it the run is plain cross-entropy on the same data."""
    sfr_target_store: str = "targets"
    """Folder of the target store inside each prepared data folder; written by `megatron-sfr embed`."""


@dataclass
class PreparedDatasetConfig(BlendedMegatronDatasetConfig):
    """Upstream's dataset configuration, and the store to read in each prepared folder (None: no targets)."""

    target_store: str | None = None


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
            item |= pad_anchors(sample.anchors, self.dataset.manifest.max_anchors, self.targets)
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


def pad_anchors(anchors: Anchors, most: int, targets: TargetStore) -> dict[str, np.ndarray]:
    """Anchors as arrays [A] and targets [A, D] in fp16; padding has weight 0, position 0 and target 0."""
    n = len(anchors.position)
    position, weight = np.zeros(most, dtype=np.int64), np.zeros(most, dtype=np.float32)
    target = np.zeros((most, targets.dim), dtype=np.float16)
    position[:n] = anchors.position
    weight[:n] = anchor_weights(anchors.ordinal, anchors.length, anchors.response)
    target[:n] = targets[anchors.segment]
    return {"anchor_position": position, "anchor_weight": weight, "anchor_target": target}


def build_datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
    """Upstream's train_valid_test_datasets_provider, for every rank."""
    del vp_stage  # each virtual stage reads the same samples
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = PreparedDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        full_validation=args.full_validation,
        target_store=args.sfr_target_store if args.sfr else None,
    )
    return BlendedMegatronDatasetBuilder(PreparedDataset, list(num_samples), lambda: True, config).build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # upstream: every rank opens its own memory map
