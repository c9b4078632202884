"""Prepared conversations as an upstream dataset, so that upstream blends, samples and resumes them.

An item is a sequence of S tokens (S sequence length) that holds one conversation, or several when packed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank

from megatron_sfr.data.prepared.conversations import PreparedData, Sample
from megatron_sfr.data.prepared.reference_store import ReferenceStore
from megatron_sfr.objectives.anchored.reference import LOG_P, TOKEN
from megatron_sfr.training.data.anchor_arrays import (
    AnchorPlan,
    AnchorSizes,
    EntryOptions,
    SequenceAnchors,
    TargetReader,
    join_anchors,
    join_streams,
)
from megatron_sfr.training.data.packing import (
    PackedSequences,
    first_fit_decreasing,
    most_in_a_sequence,
    padded_lengths,
    shuffle,
)
from megatron_sfr.training.data.persona_groups import group_array

logger = logging.getLogger(__name__)


@dataclass
class PreparedDatasetConfig(BlendedMegatronDatasetConfig):
    """Upstream's dataset configuration, with the options of prepared conversations."""

    packed: bool = False
    """Whether several conversations are packed into a sequence."""
    multiple: int = 1
    """Tokens to a multiple of which each packed conversation is padded."""
    anchors: AnchorPlan | None = None
    """How to build the anchors' arrays; None: items have no anchors."""
    text_length: int | None = None
    """Tokens of a text in KL-flow training; None for other training tasks."""
    reference_store: str | None = None
    """Name of the reference store's folder inside each prepared folder; None: items have no reference."""


class PreparedDataset(MegatronDataset):
    """Repeats one prepared folder for the requested epochs; each training epoch reshuffles the conversations."""

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
        self.targets = TargetReader(dataset, config.anchors) if config.anchors is not None else None
        self.anchor_sizes: AnchorSizes | None = None
        """Size of the items' anchor arrays. `provider.build` sets it when all datasets of the run are built."""
        store = config.reference_store
        self.reference = ReferenceStore.open(dataset.folder / store, dataset) if store is not None else None
        self.groups: dict[str, int] = {}
        """Numbers of the personas' groups; empty: items have no `group`."""
        self.lengths = np.ones(len(indices), np.int64)
        if config.packed:
            self.lengths = padded_lengths(dataset.positions[indices], config.multiple)
        self.packed = first_fit_decreasing(self.lengths, config.sequence_length if config.packed else 1)
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        if config.packed and len(indices):
            full = dataset.positions[indices].sum() / (len(self.packed) * config.sequence_length)
            packed = f"{len(indices):,} conversations in {len(self.packed):,} packed sequences, {full:.1%} full"
            log_single_rank(logger, logging.INFO, f"> {dataset_path} ({index_split.name}): {packed}")

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: PreparedData) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PreparedDatasetConfig) -> PreparedData:
        prepared = PreparedData.open(Path(dataset_path))
        if prepared.manifest.seq_length > config.sequence_length:
            raise ValueError(
                f"{dataset_path} was prepared for sequences of {prepared.manifest.seq_length} tokens, but seq_length "
                f"is {config.sequence_length}: raise seq_length, or prepare again with --seq-length"
            )
        longest = prepared.manifest.seq_length + 1
        if config.text_length is not None and longest > config.text_length:
            raise ValueError(
                f"{dataset_path} has conversations of up to {longest} tokens, but with this seq_length kl-flow reads "
                f"{config.text_length}: raise seq_length to {config.sequence_length + longest - config.text_length}"
            )
        return prepared

    def _epoch(self, epoch: int) -> PackedSequences:
        """The epoch's sequences, each a list of positions in `indices`."""
        if self.index_split is not Split.train:
            return self.packed
        return shuffle(self.packed, self.lengths, np.random.default_rng([self.config.random_seed, epoch]))

    def __len__(self) -> int:
        return max(self.num_samples or 0, len(self.packed))

    def conversations(self, idx: int) -> tuple[int, np.ndarray]:
        """Epoch and conversations (indices into the prepared folder) of sequence `idx` of the run."""
        epoch, place = divmod(int(idx), len(self.packed))
        return epoch, self.indices[self.epoch(epoch)[place]]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sequence `idx` of the run, as arrays of fixed shape.

        An anchor's noise is keyed by its conversation and epoch, so that packing and order do not change it.
        """
        epoch, conversations = self.conversations(idx)
        samples = [self.dataset[int(i)] for i in conversations]
        starts = sequence_starts(samples, self.config.multiple)
        item: dict[str, Any] = dict(sequence_arrays(samples, starts, self.config.sequence_length))
        if not self.config.packed:
            del item["document"]
        if self.groups:
            item["group"] = group_array(samples, starts, self.groups, self.config.sequence_length)
        if self.reference is not None:
            item[TOKEN], item[LOG_P] = self.reference.arrays(conversations.tolist(), item["loss_mask"])
        if self.config.text_length is not None:
            item["sample"] = int(epoch * len(self.dataset) + conversations[0])
        if self.targets is not None:
            keys = epoch * len(self.dataset) + conversations
            assert self.anchor_sizes is not None, "provider.build sets anchor_sizes"
            item |= self.targets.arrays(self._joined(samples, keys, starts[:-1]), self.anchor_sizes)
        return item

    def _joined(self, samples: Sequence[Sample], keys: np.ndarray, starts: np.ndarray) -> SequenceAnchors:
        """The anchors of a sequence's samples, by the rule of the folder."""
        parts = [sample.anchors for sample in samples]
        if self.dataset.manifest.anchor_rule == "reference":
            return join_streams(parts, [sample.loss_mask for sample in samples], keys, starts)
        return join_anchors(parts, keys, starts)

    def segments(self, idx: int) -> tuple[int, np.ndarray]:
        """Number of the prepared folder, and the targets that sequence `idx` reads from it."""
        assert self.targets is not None
        assert self.targets.number is not None
        _, conversations = self.conversations(idx)
        segments = [self.dataset[int(i)].anchors.segment for i in conversations]
        return self.targets.number, np.concatenate(segments).astype(np.int64)

    def sizes(self, options: EntryOptions) -> AnchorSizes:
        """Bounds on the anchors of any sequence."""
        manifest, length = self.dataset.manifest, self.config.sequence_length
        if self.config.packed:
            lengths = padded_lengths(self.dataset.positions, self.config.multiple)
            targets, tokens = most_in_a_sequence(self.dataset.anchor_counts, lengths, length), length
        else:
            targets, tokens = manifest.max_anchors, manifest.max_response_tokens
        anchors_only = options.fill == "anchors_only" and not options.zero_targets
        entries = targets if anchors_only else tokens * len(manifest.horizons)
        return AnchorSizes(targets + options.zero_targets, entries)


def sequence_starts(samples: Sequence[Sample], multiple: int = 1) -> np.ndarray:
    """Start of each sample in their sequence, and the end of the last one: int64 [n + 1].

    multiple: to which samples are padded.
    """
    lengths = np.array([0, *(len(sample.tokens) - 1 for sample in samples)])
    return np.cumsum(lengths + -lengths % multiple)


def sequence_arrays(samples: Sequence[Sample], starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Joins samples with these starts into upstream's arrays [S] and `document` [S], which numbers them from 0.

    Labels are the next tokens. Padding is masked out of the loss. Behind a sample it counts as part of the sample, and
    at the end of the sequence it is a separate document.
    """
    arrays = {name: np.zeros(length, np.int64) for name in ("tokens", "labels", "position_ids", "document")}
    loss_mask = np.zeros(length, np.float32)
    for number, (sample, start, end) in enumerate(zip(samples, starts[:-1], starts[1:], strict=True)):
        tokens = slice(start, start + len(sample.tokens) - 1)
        arrays["tokens"][tokens], arrays["labels"][tokens] = sample.tokens[:-1], sample.tokens[1:]
        loss_mask[tokens] = sample.loss_mask[1:]
        arrays["document"][start:end], arrays["position_ids"][start:end] = number, np.arange(end - start)
    rest = length - starts[-1]
    arrays["document"][starts[-1] :], arrays["position_ids"][starts[-1] :] = len(samples), np.arange(rest)
    return arrays | {"loss_mask": loss_mask}
