"""Attention under context parallelism without Transformer Engine: each rank gathers the keys and values of all ranks.

Upstream's local attention refuses context parallelism (megatron-core 0.19.2). This one is for CPUs and for tests: its
memory grows with the whole sequence. Packed sequences come as cu_seqlens, as for Transformer Engine, or as a mask.
Shapes: S positions of this rank, R ranks, K = R S, B samples.
"""

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_sfr.runtime.parallel import context_size, gather_over_context, sequence_positions


def gathered_mask(
    position_S: Tensor, position_K: Tensor, bounds: Tensor, window: tuple[int, int] | None = None
) -> Tensor:
    """The masked pairs of this rank's queries and all keys, by their positions in the sequence: bool [1, 1, S, K].

    Args:
        bounds: where the texts of the sequence start, and its end, int [n + 1]; a query sees its own text only.
        window: how many positions before and after its own a query sees; None: all earlier ones and its own.
    """
    text_S, text_K = (torch.searchsorted(bounds.long(), x, right=True) for x in (position_S, position_K))
    distance_SK = position_K[None, :] - position_S[:, None]
    before, after = window or (len(position_K), 0)
    return ((text_S[:, None] != text_K) | (distance_SK < -before) | (distance_SK > after))[None, None]


class GatheredAttention(DotProductAttention):
    """Upstream's local attention, from this rank's queries to the keys of all context-parallel ranks.

    Keys are in the order of the ranks. Without a mask, attention is causal, within the texts of packed_seq_params if
    they are given; a mask of the forward step is [B, 1, S, K].
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        undivided = copy.copy(config)
        undivided.context_parallel_size = 1  # upstream's constructor asserts it
        super().__init__(undivided, *args, **kwargs)
        softmax = self.scale_mask_softmax
        self.window, softmax.window_size = softmax.window_size, None  # its mask would count from the first key

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Upstream's interface: [S, B, heads, dimension] each, without B if packed_seq_params are given; returns
        [S, B, heads * dimension]."""
        bounds = torch.tensor([0, len(query) * context_size()])
        if packed_seq_params is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q.cpu()
        if attention_mask is None:
            attention_mask = gathered_mask(*sequence_positions(bounds), bounds, self.window).to(query.device)
        both = gather_over_context(torch.stack([key, value], dim=1))
        key, value = both.unbind(1)
        return super().forward(query, key.contiguous(), value.contiguous(), attention_mask, *args, **kwargs)
