"""Losses with a closed-form gradient over a sharded vocabulary, in two passes over the logits.

The first pass computes the statistics of each token, which one collective combines; the second overwrites the logits
with the gradient. Logits are never gathered.
Shapes: T tokens, V columns of the local shard, N statistics per token, C chosen columns.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sfr.kernels import choose
from megatron_sfr.kernels.columns import Columns
from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec, Vocab, combine
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients


def sum_dtype(z: Tensor) -> torch.dtype:
    """The dtype of sums over logits: fp32, or float64 for float64 logits."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


class TokenValues(NamedTuple):
    """What training reports about each token, all [T] in fp32 (or float64); 0 for ignored tokens."""

    loss: Tensor
    """The objective; differentiable."""
    cross_entropy: Tensor
    """-ln p_y."""
    entropy: Tensor
    """Of the model's distribution, in nats."""
    correct: Tensor
    """1 if no logit is larger than the label's, else 0."""


@dataclass(frozen=True)
class FirstPass:
    """The results of the first pass; ignored tokens have values and coefficients 0."""

    stats: LogitStatistics
    z_y_T: Tensor
    """The label's logit; only computed if the loss weights tokens by it."""
    result: LossAndCoefficients
    values: TokenValues
    columns_TC: Tensor | None
    """The gradient of the loss's chosen columns, without the label's term; None if it has none."""


def first_pass(z_TV: Tensor, y_T: Tensor, loss: ClosedFormLoss, vocab: Vocab) -> FirstPass:
    """Loss, gradient coefficients and reported values of each token from a shard's logits."""
    z_TV = vocab.real(z_TV)
    spec, width = loss.statistics, z_TV.shape[-1]
    if loss.columns is not None and spec != StatisticsSpec():
        name = type(loss).__name__
        raise ValueError(f"{name} has chosen columns: its statistics must be StatisticsSpec(), not {spec}")
    z_y_T = z_TV.new_zeros(len(y_T), dtype=sum_dtype(z_TV))
    if spec.c:  # the weights need the label's logit before the pass: one more collective of one float per token
        y_local_T = vocab.local(y_T, width)
        own_T = z_TV.gather(-1, y_local_T.clamp(min=0)[:, None])[:, 0] if width else z_y_T
        own_T = torch.where(y_local_T >= 0, own_T.to(z_y_T.dtype), 0)
        z_y_T = vocab.gather(own_T[:, None]).sum(0)[:, 0]
    count = 0 if loss.columns is None else loss.columns.shape[-1]
    stats = combine(vocab.gather(_statistics(z_TV, y_T, z_y_T, loss, vocab)), spec.beta, count)
    kept_T = y_T >= 0
    result = LossAndCoefficients(*(torch.where(kept_T, x, 0) for x in loss.finalize(stats)))
    measured = (stats.u.log() - stats.x_y, stats.entropy, (stats.x_y >= 0).to(stats.u.dtype))
    values = TokenValues(result.loss, *(torch.where(kept_T, x, 0) for x in measured))
    columns_TC = torch.where(kept_T[:, None], loss.columns_gradient(stats), 0) if count else None
    return FirstPass(stats, z_y_T, result, values, columns_TC)


def _statistics(z_TV: Tensor, y_T: Tensor, z_y_T: Tensor, loss: ClosedFormLoss, vocab: Vocab) -> Tensor:
    """The shard's statistics, which leave chosen columns out, and the logits of these: [T, N + C]."""
    spec, width = loss.statistics, z_TV.shape[-1]
    known = {"beta": spec.beta, "moments": spec.moments, "c": spec.c, "top_k": spec.top_k}
    read = partial(choose(z_TV).row_statistics, z_TV, vocab.local(y_T, width), z_y_T, **known)
    if loss.columns is None:
        return read()
    columns = Columns(loss.columns, vocab, width)
    chosen_TC = columns.read(z_TV, z_y_T.dtype)
    label_T1 = Columns(y_T[:, None], vocab, width).read(z_TV, z_y_T.dtype)
    with columns.left_out(z_TV):
        stats_TN = read()
    stats_TN[:, 5] = label_T1[:, 0]  # the label may be among the columns
    return torch.cat([stats_TN, chosen_TC], dim=-1)


def write_gradient(
    z_TV: Tensor,
    y_T: Tensor,
    m_T: Tensor,
    z_y_T: Tensor,
    softmax_coef_T: Tensor,
    label_coef_T: Tensor,
    columns_TC: Tensor | None,
    loss: ClosedFormLoss,
    vocab: Vocab,
) -> None:
    """Overwrites a shard's logits with the gradient, and the padding columns of the vocabulary with 0."""
    spec, real_TV = loss.statistics, vocab.real(z_TV)
    width = real_TV.shape[-1]
    choose(z_TV).write_gradient(
        real_TV, vocab.local(y_T, width), m_T, z_y_T, softmax_coef_T, label_coef_T, beta=spec.beta, c=spec.c
    )
    if columns_TC is not None:
        assert loss.columns is not None
        label_TC = torch.where(loss.columns == y_T[:, None], label_coef_T[:, None], 0)
        Columns(loss.columns, vocab, width).write(real_TV, columns_TC - label_TC)
    z_TV[:, width:] = 0
