"""Vocab-parallel token losses: one pass over the logits computes the statistics of each token, one writes the gradient.

Every objective has a gradient of the form  dL/dz_i = scale w_i exp((z_i - m) / beta) - spike [i = y],  so an objective
only names the statistics it needs and computes loss, scale and spike from them. Logits are never gathered or copied.
Shapes: T tokens, V columns of the local shard, N statistics per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_sfr.kernels import choose
from megatron_sfr.kernels.vocab_parallel import Rows, Scan, Vocab, combine

IGNORED = -100


class Closed(NamedTuple):
    """Loss, softmax coefficient (scale) and label coefficient (spike) of each token; [T] each."""

    loss: Tensor
    scale: Tensor
    spike: Tensor


class TokenObjective(Protocol):
    """A loss of one token, given by statistics of its logits."""

    @property
    def scan(self) -> Scan:
        """The statistics that the loss needs."""

    def close(self, rows: Rows) -> Closed:
        """The loss and the two coefficients of its gradient, computed from the statistics."""


@dataclass(frozen=True)
class _Known:
    """Everything the backward pass needs that does not depend on the column."""

    rows: Rows
    z_y_T: Tensor
    closed: Closed
    cross_entropy_T: Tensor


def _know(z_TV: Tensor, y_T: Tensor, objective: TokenObjective, vocab: Vocab) -> _Known:
    scan, width = objective.scan, z_TV.shape[-1]
    y_local_T = vocab.local(y_T, width)
    z_y_T = z_TV.new_zeros(len(y_T), dtype=_accumulator(z_TV))
    if scan.c:  # the weights need the label's logit before the pass: one more collective of one float per token
        own_T = z_TV.gather(-1, y_local_T.clamp(min=0)[:, None])[:, 0] if width else z_y_T
        own_T = torch.where(y_local_T >= 0, own_T.to(z_y_T.dtype), 0)
        z_y_T = vocab.gather(own_T[:, None]).sum(0)[:, 0]
    stats_TN = choose(z_TV).row_statistics(
        z_TV, y_local_T, z_y_T, beta=scan.beta, moments=scan.moments, c=scan.c, top_k=scan.top_k
    )
    rows = combine(vocab.gather(stats_TN), scan.beta)
    cross_entropy_T = rows.u.log() - rows.x_y
    kept_T = y_T >= 0
    closed = Closed(*(torch.where(kept_T, x, 0) for x in objective.close(rows)))
    return _Known(rows, z_y_T, closed, torch.where(kept_T, cross_entropy_T, 0))


def _accumulator(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TV: Tensor, y_T: Tensor, objective: TokenObjective, vocab: Vocab, overwrite: bool
    ) -> tuple[Tensor, Tensor]:
        known = _know(vocab.real(z_TV), y_T, objective, vocab)
        ctx.save_for_backward(z_TV, y_T, known.rows.m, known.z_y_T, known.closed.scale, known.closed.spike)
        ctx.objective, ctx.vocab, ctx.overwrite = objective, vocab, overwrite
        ctx.mark_non_differentiable(known.cross_entropy_T)
        return known.closed.loss, known.cross_entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        z_TV, y_T, m_T, z_y_T, scale_T, spike_T = ctx.saved_tensors
        g_TV = z_TV if ctx.overwrite else z_TV.clone()
        _write_gradient(g_TV, y_T, m_T, z_y_T, scale_T * grad_T, spike_T * grad_T, ctx.objective.scan, ctx.vocab)
        return g_TV, None, None, None, None


def _write_gradient(
    z_TV: Tensor, y_T: Tensor, m_T: Tensor, z_y_T: Tensor, scale_T: Tensor, spike_T: Tensor, scan: Scan, vocab: Vocab
) -> None:
    """Overwrites a shard's logits with the gradient, and the padding columns of the vocabulary with 0."""
    real_TV = vocab.real(z_TV)
    width = real_TV.shape[-1]
    choose(z_TV).write_gradient(
        real_TV, vocab.local(y_T, width), m_T, z_y_T, scale_T, spike_T, beta=scan.beta, c=scan.c
    )
    z_TV[:, width:] = 0


def token_loss(
    z_TV: Tensor, y_T: Tensor, objective: TokenObjective, vocab: Vocab, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """The objective's loss and the cross-entropy (not differentiable) of each token: [T] each, fp32 (or float64).

    Args:
        z_TV: logits of this shard, any floating dtype.
        y_T: int64 labels in the whole vocabulary. Negative labels are ignored: loss and gradient are exactly 0.
        overwrite: whether the backward pass writes the gradient over the logits; nothing else may then read them.
    """
    return _TokenLoss.apply(z_TV, y_T, objective, vocab, overwrite)


@torch.no_grad()
def certainty(z_TV: Tensor, vocab: Vocab) -> tuple[Tensor, Tensor]:
    """Entropy in nats and largest probability of each token's distribution: fp32 (or float64) [T] each.

    With x_i = z_i - m and u = sum_i exp(x_i): H = ln u - sum_i exp(x_i) x_i / u, and the largest probability is 1 / u.
    """
    real_TV = vocab.real(z_TV)
    none_T = torch.full((len(z_TV),), -1, dtype=torch.int64, device=z_TV.device)
    zero_T = z_TV.new_zeros(len(z_TV), dtype=_accumulator(z_TV))
    stats_TN = choose(z_TV).row_statistics(real_TV, none_T, zero_T, beta=1.0, moments=True, c=0.0, top_k=0)
    rows = combine(vocab.gather(stats_TN), 1.0)
    return rows.u.log() - rows.a_x / rows.u, 1 / rows.u


@torch.no_grad()
def logit_gradient(z_TV: Tensor, y_T: Tensor, objective: TokenObjective, vocab: Vocab) -> Tensor:
    """Gradient of the summed loss with respect to the logits [T, V], in their dtype, computed without autograd."""
    known, g_TV = _know(vocab.real(z_TV), y_T, objective, vocab), z_TV.clone()
    closed = known.closed
    _write_gradient(g_TV, y_T, known.rows.m, known.z_y_T, closed.scale, closed.spike, objective.scan, vocab)
    return g_TV
