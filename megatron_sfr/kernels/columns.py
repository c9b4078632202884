"""Reads, overwrites and leaves out some columns of each token's logits, chosen by token id, in a vocabulary shard.

A loss that treats these columns separately needs the sum over all others. Leaving them out of the sum, instead of
subtracting them from it, keeps a small rest exact.
Shapes: T tokens, V columns of the local shard, C chosen columns of each token, most of which other shards may hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_sfr.kernels.plain import EMPTY
from megatron_sfr.kernels.vocab_parallel import Vocab


class Columns:
    """The chosen columns of a shard's logits."""

    def __init__(self, token_TC: Tensor, vocab: Vocab, width: int) -> None:
        """
        Args:
            token_TC: token ids in the whole vocabulary, int64. The ids of a token differ, or have equal values.
            width: number of the shard's real columns.
        """
        self.width = width
        column_TC = vocab.local(token_TC, width)
        self.here_TC, self.column_TC = column_TC >= 0, column_TC.clamp(min=0)

    def read(self, z_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """The logits of the chosen columns: [T, C]; -1e30 where another shard holds the column."""
        if not self.width:
            return torch.full(self.here_TC.shape, EMPTY, dtype=dtype, device=z_TV.device)
        return torch.where(self.here_TC, z_TV.gather(1, self.column_TC).to(dtype), EMPTY)

    def write(self, z_TV: Tensor, value_TC: Tensor) -> None:
        """Overwrites the chosen columns of this shard.

        Entries of other shards are written to column 0, with the value that column 0 gets anyway. So the index has a
        fixed shape, and the host does not wait for the device.
        """
        if not self.width:
            return
        value_TC = value_TC.to(z_TV.dtype)
        at_zero_TC = self.here_TC & (self.column_TC == 0)
        given_T1 = torch.where(at_zero_TC, value_TC, -torch.inf).amax(1, keepdim=True)
        zero_T1 = torch.where(at_zero_TC.any(1, keepdim=True), given_T1, z_TV[:, :1])
        z_TV.scatter_(1, self.column_TC, torch.where(self.here_TC, value_TC, zero_T1))

    @contextmanager
    def left_out(self, z_TV: Tensor) -> Iterator[None]:
        """Context in which the chosen logits are -inf, so that no sum includes them. Restores them exactly."""
        z_TV = z_TV.data  # the same values afterwards: autograd need not count this as a change
        kept_TC = z_TV.gather(1, self.column_TC) if self.width else z_TV.new_empty(0)
        self.write(z_TV, torch.full_like(self.column_TC, -torch.inf, dtype=z_TV.dtype))
        try:
            yield
        finally:
            self.write(z_TV, kept_TC)
