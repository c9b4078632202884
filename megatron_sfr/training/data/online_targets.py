"""Online targets: the encoder runs beside training and fills the stores ahead of it, in the order of the sampler.

On the last pipeline stage the first of the ranks that share a batch (by tensor and context parallelism) owns the
encoder's process, and broadcasts the targets to the others.
Shapes: B samples, R target embeddings, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch import Tensor

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.encoder import EncoderOptions, load_quietly
from megatron_sfr.data.targets.prefetch import Needs, Prefetcher
from megatron_sfr.data.targets.store import EncoderIdentity, TargetStore, differences
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.parallel import (
    broadcast_over_context,
    broadcast_over_tensor,
    context_rank,
    data_rank,
    data_size,
    tensor_rank,
)


class OnlineTargets:
    """Provides the targets of each microbatch on the ranks of the last pipeline stage."""

    def __init__(
        self, folders: Sequence[Path], store: str, *, lookahead: int, encoder_device: str, threads: int
    ) -> None:
        """
        Args:
            folders: the prepared folders of the run, in the numbering of the datasets.
            store: name of the target store's folder in each of them.
            lookahead: microbatches that the encoder may be ahead.
            threads: CPU threads of the encoder.
        """
        prepared = [open_prepared(folder) for folder in folders]
        stores = [TargetStore.open(data.folder / store, data, partial=True) for data in prepared]
        self._dim, self._prefetcher = stores[0].dim, None
        if tensor_rank() == context_rank() == 0:
            encoder = partial(load_quietly, stores[0].manifest.encoder, _options(stores, encoder_device))
            self._prefetcher = Prefetcher(stores, encoder, lookahead=lookahead, threads=threads)

    def follow(self, dataset: Any, sampler: MegatronPretrainingSampler) -> None:
        """Sets the dataset that training reads, and the order, from the sampler's first sample."""
        if self._prefetcher is not None:
            self._prefetcher.follow(needs_of(dataset, indices) for indices in sampler)

    def targets(self, store_B: Tensor, row_BR: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """The targets, fp16 [B, R, D], and the milliseconds that the call waited for them [1], both on the device.

        Args:
            store_B: number of the prepared folder.
            row_BR: indices in its store. -1 is padding, whose target is 0.
            training: whether the microbatch is one of training, not of evaluation.
        """
        # Pinned, or the copies below would block. torch's allocator keeps pinned memory until the copy has ended.
        pinned = device().type == "cuda"
        found = torch.zeros(*row_BR.shape, self._dim, dtype=torch.float16, pin_memory=pinned)
        wait = torch.zeros(1, dtype=torch.float32, pin_memory=pinned)
        if self._prefetcher is not None:
            before = self._prefetcher.waited
            for found_RD, store, row_R in zip(found.numpy(), store_B.tolist(), row_BR.numpy(), strict=True):
                there = row_R >= 0
                found_RD[there] = self._prefetcher.fetch(store, row_R[there])
            wait[0] = 1e3 * (self._prefetcher.waited - before)
            if training:
                self._prefetcher.advance()
        target, wait = (x.to(device(), non_blocking=True) for x in (found, wait))
        for x in (target, wait):
            broadcast_over_tensor(broadcast_over_context(x))
        return target, wait

    def close(self) -> None:
        """Ends the encoder's process. The embeddings that it has written stay."""
        if self._prefetcher is not None:
            self._prefetcher.close()


def needs_of(dataset: Any, indices: Sequence[int]) -> Needs:
    """The target embeddings that a microbatch of a dataset, or of a blend, reads."""
    if not isinstance(dataset, BlendedDataset):
        return [dataset.segments(index) for index in indices]
    parts = ((dataset.datasets[dataset.dataset_index[i]], dataset.dataset_sample_index[i]) for i in indices)
    return [part.segments(int(index)) for part, index in parts]


def sampler_of(args: Any, dataset: Any) -> MegatronPretrainingSampler:
    """The order in which upstream's loader (dataloader_type single) reads the remaining training samples."""
    return MegatronPretrainingSampler(
        total_samples=len(dataset),
        consumed_samples=args.consumed_train_samples,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=data_rank(),
        data_parallel_size=data_size(),
    )


def _options(stores: Sequence[TargetStore], encoder_device: str) -> EncoderOptions:
    """How to load the encoder of these stores. Raises ValueError if they have different encoders."""
    first = _encoder_of(stores[0])
    for store in stores:
        if changed := differences(_encoder_of(store), first):
            raise ValueError(
                f"{store.folder} and {stores[0].folder} differ in {', '.join(changed)}: online targets have one "
                "encoder; embed all data with the same options"
            )
    return EncoderOptions(
        pooling=first.pooling,
        normalize=first.normalize,
        prompt=first.prompt,
        max_length=first.max_length or None,
        dtype=first.dtype,
        device=encoder_device,
        revision=first.revision,
    )


def _encoder_of(store: TargetStore) -> EncoderIdentity:
    """The encoder alone: stores of other texts, or with other block sizes, may share it."""
    return EncoderIdentity(**{field.name: getattr(store.manifest, field.name) for field in fields(EncoderIdentity)})
