"""Runs one objective through the two passes of a kernels module, over the shards of one vocabulary.

Shapes: T tokens, V columns, R shards.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_sfr.kernels.plain import EMPTY
from megatron_sfr.kernels.vocab_parallel import Rows, Vocab, combine
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.gem import GEM, GEMOptions
from megatron_sfr.objectives.token.sed import SED, SEDOptions
from megatron_sfr.objectives.token.token_loss import TokenObjective

OBJECTIVES: dict[str, TokenObjective] = {
    "ce": CrossEntropy(),
    "gem-linear": GEM(),
    "gem-logsigmoid": GEM(GEMOptions(gem_h="logsigmoid", gem_beta=0.5, gem_slope=0.3)),
    "sed": SED(SEDOptions(sed_threshold=0.5)),
    "sed-128": SED(SEDOptions(sed_top_k=128, sed_threshold=0.9)),
    "dft": DFT(),
}


@dataclass(frozen=True)
class Found:
    """The results of the two passes, and the coefficients of the gradient."""

    rows: Rows
    loss_T: Tensor
    spike_T: Tensor
    gradient_TV: Tensor  # of the real columns


def through(
    kernels: ModuleType, z_TV: Tensor, y_T: Tensor, objective: TokenObjective, *, size: int, shards: int
) -> Found:
    """Splits the logits into equal shards, of which only the first `size` columns are real, and combines them.

    The gradient is that of the sum of the kept tokens' losses, each weighted by 1 + its row index.
    """
    T, V = z_TV.shape
    assert V % shards == 0
    scan, width = objective.scan, V // shards
    z_TV = z_TV.clone()
    vocabs = [Vocab(size, r * width) for r in range(shards)]
    shards_z = [vocab.real(z_TV[:, vocab.start : vocab.start + width]) for vocab in vocabs]
    shards_y = [vocab.local(y_T, z.shape[1]) for vocab, z in zip(vocabs, shards_z, strict=True)]
    dtype = torch.float64 if z_TV.dtype == torch.float64 else torch.float32
    z_y_T = torch.where(y_T >= 0, z_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0].to(dtype), 0)
    stats = [
        kernels.row_statistics(z, y, z_y_T, beta=scan.beta, moments=scan.moments, c=scan.c, top_k=scan.top_k)
        for z, y in zip(shards_z, shards_y, strict=True)
    ]
    rows = combine(torch.stack(stats), scan.beta)
    if not scan.moments:
        rows = rows._replace(a_x=torch.zeros_like(rows.a_x))  # not requested
    closed = objective.close(rows)
    weight_T = torch.where(y_T >= 0, torch.arange(1, T + 1, device=y_T.device), 0).to(dtype)
    scale_T, spike_T = (torch.where(y_T >= 0, x * weight_T, 0) for x in (closed.scale, closed.spike))
    for z, y in zip(shards_z, shards_y, strict=True):
        kernels.write_gradient(z, y, rows.m, z_y_T, scale_T, spike_T, beta=scan.beta, c=scan.c)
    return Found(rows, torch.where(y_T >= 0, closed.loss, 0), spike_T, z_TV[:, :size])


def worst(actual: Found, exact: Found, *, truncates: bool = False) -> dict[str, float]:
    """Largest error of each quantity in units of its tolerance; at most 1 passes, NaN fails. exact: in float64.

    Sums have a relative error of at most 1e-5. The exponential in a gradient has a relative error of 2^-23 |x| / beta
    with exponents down to -87 in fp32, at most 2e-5; the difference at the label has an error of 1e-6 of the minuend.
    The gradient is rounded once to the logits' dtype (half an ulp), or truncated (one ulp).
    """
    kind = torch.finfo(actual.gradient_TV.dtype)
    pairs = zip(Rows._fields, actual.rows, exact.rows, strict=True)
    ratios = {name: _ratio(x, y, 1e-5 * y.abs()) for name, x, y in pairs if y.numel()}
    ratios["loss"] = _ratio(actual.loss_T, exact.loss_T, 1e-5 * (1 + exact.loss_T.abs() + exact.rows.x_y.abs()))
    expected_TV = exact.gradient_TV
    unit = kind.eps if truncates else kind.eps / 2
    rounding = (unit + 2e-5) * expected_TV.abs() + max(kind.smallest_normal * kind.eps, 1e-37)
    ratios["gradient"] = _ratio(actual.gradient_TV, expected_TV, rounding + 1e-6 * exact.spike_T.abs()[:, None])
    return ratios


def _ratio(x: Tensor, y: Tensor, bound: Tensor) -> float:
    error = (x.double().clamp(min=EMPTY) - y.double().clamp(min=EMPTY)).abs()
    return torch.where(error == 0, 0, error / bound).max().item()
