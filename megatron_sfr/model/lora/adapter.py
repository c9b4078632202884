"""One adapter of a linear layer: s B_p A_p x for each part p of the layer's output, split like the layer's weight.

Megatron fuses queries, keys and values in one layer, and gate and up projection in another. Each of these parts has its
own A, as in PEFT, so that adapters convert to PEFT and back without loss. The parts' A are stacked; B has the rows of
the layer's weight, in the same order.

Shapes: I input features of this rank, O output features of this rank, P parts, R rank, S sequence, B batch (experts:
one axis of tokens), N repetitions of the parts in a rank's rows (groups of queries, keys and values).
"""

from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_sfr.model.lora.options import LoRAOptions


@dataclass(frozen=True)
class AdaptedLayer:
    """How Megatron splits the linear layer that an adapter belongs to."""

    column: bool
    """Whether the output features are split over the group (a column-parallel layer); else the input features are."""
    rows: tuple[int, ...]
    """Output features of each part, in a pattern that repeats: (O,), gate and up, or q, k and v of a group."""
    group: ProcessGroup
    """The layer's tensor-parallel group."""
    sequence_parallel: bool
    """Whether the tokens outside the layer are split over the group."""
    expert: bool
    """Whether the layer is an expert's: the dispatcher of tokens then communicates, not the layer."""


class Adapter(nn.Module):
    """The parameters A [P * R, I] and B [O, R] of one layer.

    B starts at 0. A is drawn from U(-1/sqrt(in), 1/sqrt(in)) as in PEFT, by a generator that depends only on the seed
    and the layer's name: the values are the same in every parallel layout, and no other random stream moves.

    Args:
        options: rank, scale and dropout.
        layer: how the adapted layer is split.
        weight: the adapted layer's weight [O, I], for dtype, device and attributes.
        seed: the run's seed and the layer's name in the complete model.
    """

    def __init__(self, options: LoRAOptions, layer: AdaptedLayer, weight: Tensor, seed: str) -> None:
        super().__init__()
        assert options.rank is not None
        self.layer, self.rank, self.dropout = layer, options.rank, options.dropout
        self.scale = options.alpha / options.rank
        parts, size = len(layer.rows), 1 if layer.column else layer.group.size()
        in_features = weight.shape[1] * size
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(seed.encode()).digest()[:7]))
        a = torch.empty(parts * self.rank, in_features).uniform_(
            -1 / sqrt(in_features), 1 / sqrt(in_features), generator=generator
        )
        a = a.tensor_split(size, dim=1)[0 if layer.column else layer.group.rank()]
        self.lora_A = nn.Parameter(a.to(weight, copy=True))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], self.rank).to(weight))
        split, replicated = (self.lora_B, self.lora_A) if layer.column else (self.lora_A, self.lora_B)
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=0 if layer.column else 1, stride=1)
        if not layer.expert:  # each rank's gradient is that of its tokens: upstream sums them over the group
            replicated.sequence_parallel = layer.sequence_parallel  # type: ignore[attr-defined]
        for p in (self.lora_A, self.lora_B):
            p.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's part of the layer's output, from the layer's input; both as the layer has them on this rank."""
        layer, a, b = self.layer, self.lora_A, self.lora_B
        if layer.expert:  # upstream does not sum gradients over the experts' group
            a = copy_to_tensor_model_parallel_region(a, layer.group) if layer.column else a
            b = b if layer.column else copy_to_tensor_model_parallel_region(b, layer.group)
        z = F.linear(self._dropped(x), a) * self.scale
        if not layer.expert:
            z = self._entering(z) if layer.column else self._leaving(z)
        return self._up(z, b)

    def _entering(self, z: Tensor) -> Tensor:
        """z of all tokens, for a column-parallel B. Its R features are gathered, not the layer's input."""
        if self.layer.sequence_parallel:
            return gather_from_sequence_parallel_region(z, group=self.layer.group)
        return copy_to_tensor_model_parallel_region(z, self.layer.group)

    def _leaving(self, z: Tensor) -> Tensor:
        """The sum of z over the group, for a row-parallel A."""
        if self.layer.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(z, group=self.layer.group)
        return reduce_from_tensor_model_parallel_region(z, self.layer.group)

    def _up(self, z: Tensor, b: Tensor) -> Tensor:
        """B_p z_p for each part p, in the order of the layer's rows: [..., P * R] -> [..., O]."""
        rows = self.layer.rows
        if len(rows) == 1:
            return F.linear(z, b)
        parts = b.view(-1, sum(rows), self.rank).split(rows, dim=1)  # [N, rows, R] each
        y = [
            F.linear(z_p, b_p.reshape(-1, self.rank)).unflatten(-1, b_p.shape[:2])
            for z_p, b_p in zip(z.split(self.rank, dim=-1), parts, strict=True)
        ]
        return torch.cat(y, dim=-1).flatten(-2)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:
            return x
        if self.layer.column and not self.layer.sequence_parallel:  # every rank has the same input
            return F.dropout(x, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Entries of a distributed checkpoint. Of a gate and an up projection each is a tensor by itself, as upstream
        stores their weights."""
        column, offsets, group = self.layer.column, sharded_offsets, self.layer.group
        axes = {"lora_B": 0} if column else {"lora_A": 1}
        dp = (metadata or {})["dp_cp_group"]
        entries = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, axes, offsets, tp_group=group, dp_cp_group=dp
        )
        if len(self.layer.rows) == 2:
            key = f"{prefix}lora_B"
            single = bool((metadata or {}).get("singleton_local_shards"))
            entries[key] = apply_swiglu_sharded_factory(entries[key], offsets, single, group, dp)
        return entries
