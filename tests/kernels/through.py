"""Runs one loss through the two passes of a kernels module, over the shards of one vocabulary.

Shapes: T tokens, V columns, R shards.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_sfr.kernels.plain import EMPTY
from megatron_sfr.kernels.vocab_parallel import LogitStatistics, Vocab, combine
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss


@dataclass(frozen=True)
class Found:
    """The results of the two passes, and the coefficients of the gradient."""

    stats: LogitStatistics
    loss_T: Tensor
    label_coef_T: Tensor
    gradient_TV: Tensor  # of the real columns


def through(kernels: ModuleType, z_TV: Tensor, y_T: Tensor, loss: ClosedFormLoss, *, size: int, shards: int) -> Found:
    """Splits the logits into equal shards, of which only the first `size` columns are real, and combines them.

    The gradient is that of the sum of the kept tokens' losses, each weighted by 1 + its row index.
    """
    T, V = z_TV.shape
    assert V % shards == 0
    spec, width = loss.statistics, V // shards
    z_TV = z_TV.clone()
    vocabs = [Vocab(size, r * width) for r in range(shards)]
    shards_z = [vocab.real(z_TV[:, vocab.start : vocab.start + width]) for vocab in vocabs]
    shards_y = [vocab.local(y_T, z.shape[1]) for vocab, z in zip(vocabs, shards_z, strict=True)]
    dtype = torch.float64 if z_TV.dtype == torch.float64 else torch.float32
    z_y_T = torch.where(y_T >= 0, z_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0].to(dtype), 0)
    of_shards = [
        kernels.row_statistics(z, y, z_y_T, beta=spec.beta, moments=spec.moments, c=spec.c, top_k=spec.top_k)
        for z, y in zip(shards_z, shards_y, strict=True)
    ]
    stats = combine(torch.stack(of_shards), spec.beta)
    if not spec.moments:
        stats = stats._replace(a_x=torch.zeros_like(stats.a_x))  # not requested
    result = loss.finalize(stats)
    weight_T = torch.where(y_T >= 0, torch.arange(1, T + 1, device=y_T.device), 0).to(dtype)
    softmax_coef_T, label_coef_T = (
        torch.where(y_T >= 0, x * weight_T, 0) for x in (result.softmax_coef, result.label_coef)
    )
    for z, y in zip(shards_z, shards_y, strict=True):
        kernels.write_gradient(z, y, stats.m, z_y_T, softmax_coef_T, label_coef_T, beta=spec.beta, c=spec.c)
    return Found(stats, torch.where(y_T >= 0, result.loss, 0), label_coef_T, z_TV[:, :size])


def worst(actual: Found, exact: Found, *, truncates: bool = False) -> dict[str, float]:
    """Largest error of each quantity in units of its tolerance; at most 1 passes, NaN fails. exact: in float64.

    Sums have a relative error of at most 1e-5, so the logarithm of one has it as an absolute error. The exponential in
    a gradient has a relative error of 2^-23 |x| / beta with exponents down to -87 in fp32, at most 2e-5; the difference
    at the label has an error of 1e-6 of the minuend. The gradient is rounded once to the logits' dtype (half an ulp) or
    truncated (one ulp).
    """
    kind = torch.finfo(actual.gradient_TV.dtype)
    pairs = zip(LogitStatistics._fields, actual.stats, exact.stats, strict=True)
    ratios = {name: _ratio(x, y, 1e-5 * (y.abs() + (name == "log_rest"))) for name, x, y in pairs if y.numel()}
    ratios["loss"] = _ratio(actual.loss_T, exact.loss_T, 1e-5 * (1 + exact.loss_T.abs() + exact.stats.x_y.abs()))
    expected_TV = exact.gradient_TV
    unit = kind.eps if truncates else kind.eps / 2
    rounding = (unit + 2e-5) * expected_TV.abs() + max(kind.smallest_normal * kind.eps, 1e-37)
    ratios["gradient"] = _ratio(actual.gradient_TV, expected_TV, rounding + 1e-6 * exact.label_coef_T.abs()[:, None])
    return ratios


def _ratio(x: Tensor, y: Tensor, bound: Tensor) -> float:
    error = (x.double().clamp(min=EMPTY) - y.double().clamp(min=EMPTY)).abs()
    return torch.where(error == 0, 0, error / bound).max().item()
