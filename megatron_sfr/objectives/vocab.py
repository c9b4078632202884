"""The vocabulary axis, whole or sharded over tensor-parallel ranks: reductions that never gather logits.

Letters: T tokens, V columns of the local shard. Padded columns are -inf before they come here.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Vocab:
    """A shard of the vocabulary: its first column, and the group that holds the others (None: all columns are here)."""

    start: int = 0
    group: dist.ProcessGroup | None = None

    def max(self, x_TV: Tensor) -> Tensor:
        """Largest value of each row over the whole vocabulary: [T]."""
        m_T = x_TV.amax(-1)
        if self.group is not None:
            dist.all_reduce(m_T, dist.ReduceOp.MAX, group=self.group)
        return m_T

    def sum(self, x_TV: Tensor) -> Tensor:
        """Sum of each row over the whole vocabulary: [T]. Not differentiable through the group."""
        s_T = x_TV.sum(-1)
        if self.group is not None:
            dist.all_reduce(s_T, group=self.group)
        return s_T

    def softmax(self, z_TV: Tensor) -> Tensor:
        """This shard's columns of the softmax over the whole vocabulary: [T, V]."""
        e_TV = (z_TV - self.max(z_TV)[:, None]).exp()
        return e_TV / self.sum(e_TV)[:, None]

    def one_hot(self, y_T: Tensor, width: int) -> Tensor:
        """This shard's columns of the one-hot rows of the labels y: bool [T, width]."""
        column_V = torch.arange(self.start, self.start + width, device=y_T.device)
        return y_T[:, None] == column_V
