"""The vocabulary axis, complete or sharded over tensor-parallel ranks, and the kernels' statistics over it.

Shapes: T tokens, V columns of the local shard, R ranks that share the vocabulary, K largest logits, C chosen columns.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Vocab:
    """A shard of the vocabulary. Columns from `size` on are padding: they are never read and their gradient is 0."""

    size: int
    """Number of tokens of the whole vocabulary, without padding."""
    start: int = 0
    """First column of this shard."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary; None: this rank holds all columns."""

    def real(self, z_TV: Tensor) -> Tensor:
        """A view of the shard without padding columns: [T, width]."""
        return z_TV[:, : min(max(self.size - self.start, 0), z_TV.shape[-1])]

    def local(self, y_T: Tensor, width: int) -> Tensor:
        """Labels as columns of this shard, int64 [T]; -1 if the label is ignored (negative) or on another rank."""
        column_T = y_T - self.start
        return torch.where((y_T >= 0) & (column_T >= 0) & (column_T < width), column_T, -1)

    def gather(self, x_TN: Tensor) -> Tensor:
        """The tensors of all ranks, [R, T, N], in one collective."""
        if self.group is None:
            return x_TN[None]
        x_RTN = x_TN.new_empty(dist.get_world_size(self.group), *x_TN.shape)
        # torch 2.13 deprecates all_gather_into_tensor for all_gather_single, which older versions lack.
        dist.all_gather(list(x_RTN.unbind()), x_TN.contiguous(), group=self.group)
        return x_RTN


@dataclass(frozen=True)
class StatisticsSpec:
    """Which statistics one pass over the logits z of a token computes. `LogitStatistics` has their formulas.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.GEM(beta=0.5).statistics
        StatisticsSpec(beta=0.5, moments=True, c=0.0, top_k=0)
    """

    beta: float = 1.0
    """Temperature of s, a and a_x."""
    moments: bool = False
    """Whether to compute s, a and a_x, or only u and u_x."""
    c: float = 0.0
    """Slope of the weights w_i = sigmoid(c (z_i - z_y)); 0: all weights are 1."""
    top_k: int = 0
    """Number of largest logits to keep."""


class LogitStatistics(NamedTuple):
    """Statistics of each token's logits over the whole vocabulary, with x_i = z_i - m.

    Without moments s = a = u and a_x = 0. A loss gets them in `ClosedFormLoss.finalize`. The last two fields are for
    losses with chosen columns (`ClosedFormLoss.columns`), for which s, a, a_x and top have no meaning.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.LogitStatistics._fields[:2]  # the largest logit, and the sum of exp(x_i)
        ('m', 'u')
    """

    m: Tensor
    """The largest logit: [T]."""
    u: Tensor
    """sum_i exp(x_i): [T]."""
    s: Tensor
    """sum_i exp(x_i / beta): [T]."""
    a: Tensor
    """sum_i w_i exp(x_i / beta): [T]."""
    a_x: Tensor
    """sum_i w_i exp(x_i / beta) x_i: [T]."""
    x_y: Tensor
    """The label's logit minus m; undefined if the label is ignored: [T]."""
    u_x: Tensor
    """sum_i exp(x_i) x_i: [T]."""
    top: Tensor
    """The K largest logits minus m, in descending order: [T, K]."""
    x_columns: Tensor
    """The logits of the chosen columns minus m: [T, C]."""
    log_rest: Tensor
    """ln of the sum of exp(x_i) over all other columns: [T]. Exact also where it is small: nothing is subtracted."""

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats of the softmax, H = ln u - u_x / u: [T]."""
        return self.u.log() - self.u_x / self.u


def combine(stats_RTN: Tensor, beta: float, columns: int = 0) -> LogitStatistics:
    """Combines each shard's [m, u, s, a, a_x, z_y, u_x, top ...], whose sums are relative to the shard's own m.

    Args:
        columns: number of chosen columns, which the sums leave out. Their logits are the last values; a shard that does
            not hold a column has -1e30.
    """
    stats_RTN, z_RTC = stats_RTN.split([stats_RTN.shape[-1] - columns, columns], dim=-1)
    m_RT, u, s, a, a_x, z_y, u_x = stats_RTN[..., :7].unbind(-1)
    m_T = m_RT.amax(0)
    d_RT = m_RT - m_T
    plain, tempered = d_RT.exp(), (d_RT / beta).exp()
    z_y_T = z_y.amax(0)
    top_RTK = stats_RTN[..., 7:]
    top_TK = top_RTK.transpose(0, 1).flatten(1).topk(top_RTK.shape[-1], dim=-1).values
    u_T = (u * plain).sum(0)
    stats = LogitStatistics(
        m=m_T,
        u=u_T,
        s=(s * tempered).sum(0),
        a=(a * tempered).sum(0),
        a_x=((a_x + d_RT * a) * tempered).sum(0),
        x_y=z_y_T - m_T,
        u_x=((u_x + d_RT * u) * plain).sum(0),
        top=top_TK - m_T[:, None],
        x_columns=z_RTC[0],
        log_rest=u_T.log(),
    )
    return _with_columns(stats, z_RTC.amax(0), z_y_T) if columns else stats


def _with_columns(rest: LogitStatistics, z_TC: Tensor, z_y_T: Tensor) -> LogitStatistics:
    """Adds the chosen columns to the statistics of all others, which may be none."""
    m_T = torch.maximum(rest.m, z_TC.amax(-1))
    x_TC, d_T = z_TC - m_T[:, None], rest.m - m_T
    e_TC, scale_T = x_TC.exp(), d_T.exp()
    return rest._replace(
        m=m_T,
        u=rest.u * scale_T + e_TC.sum(-1),
        x_y=z_y_T - m_T,
        u_x=(rest.u_x + d_T * rest.u) * scale_T + (e_TC * x_TC).nansum(-1),  # skips 0 * -inf of masked logits
        x_columns=x_TC,
        log_rest=rest.log_rest + d_T,
    )


def choose(x: Tensor) -> ModuleType:
    """The module to use on a tensor's device: `fused` on CUDA, else `plain`. Both compute the same numbers."""
    return importlib.import_module(f"megatron_sfr.kernels.{'fused' if x.is_cuda else 'plain'}")


def sharded_softmax(l_TV: Tensor, vocab: Vocab) -> Tensor:
    """Softmax over the whole vocabulary of a shard [T, V], in place. -inf becomes 0; a shard may hold only -inf."""
    m_T1 = l_TV.amax(-1, keepdim=True).clamp(min=torch.finfo(l_TV.dtype).min)
    l_TV.sub_(m_T1).exp_()
    m_RT1, u_RT1 = vocab.gather(torch.cat([m_T1, l_TV.sum(-1, keepdim=True)], dim=-1)).split(1, dim=-1)
    top_T1 = m_RT1.amax(0)
    u_T1 = (u_RT1 * (m_RT1 - top_T1).exp()).sum(0)
    return l_TV.mul_((m_T1 - top_T1).exp() / u_T1)
