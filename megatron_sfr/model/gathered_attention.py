"""Attention under context parallelism without Transformer Engine: each rank gathers the keys and values of all ranks.

Upstream's local attention refuses context parallelism (megatron-core 0.19.2). This one is for CPUs and for tests: its
memory grows with the whole sequence.
Shapes: S positions of this rank, R ranks, K = R S, B samples.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_sfr.runtime.parallel import gather_over_context, sequence_positions


def gathered_mask(position_S: Tensor, position_K: Tensor, window: tuple[int, int] | None = None) -> Tensor:
    """The masked pairs of this rank's queries and all keys, by their positions in the sequence: bool [1, 1, S, K].

    window: how many positions before and after its own a query sees; None: all earlier ones and its own.
    """
    distance_SK = position_K[None, :] - position_S[:, None]
    if window is None:
        return (distance_SK > 0)[None, None]
    before, after = window
    return ((distance_SK < -before) | (distance_SK > after))[None, None]


class GatheredAttention(DotProductAttention):
    """Upstream's local attention, from this rank's queries to the keys of all context-parallel ranks.

    Keys are in the order of the ranks. Without a mask, attention is causal; a mask of the forward step is
    [B, 1, S, K].
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        undivided = copy.copy(config)
        undivided.context_parallel_size = 1  # upstream's constructor asserts it
        super().__init__(undivided, *args, **kwargs)
        softmax = self.scale_mask_softmax
        self.window, softmax.window_size = softmax.window_size, None  # its mask would count from the first key

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Upstream's interface: [S, B, heads, dimension] each; returns [S, B, heads * dimension]."""
        if attention_mask is None:
            own, every = (x.to(query.device) for x in sequence_positions(len(query)))
            attention_mask = gathered_mask(own, every, self.window)
        both = gather_over_context(torch.stack([key, value], dim=1))
        key, value = both.unbind(1)
        return super().forward(query, key.contiguous(), value.contiguous(), attention_mask, *args, **kwargs)
