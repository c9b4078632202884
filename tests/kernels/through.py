"""One objective through the two passes of a kernels module, over the shards of one vocabulary: what the tests compare.

Letters: T tokens, V columns, R shards.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_sfr.kernels.plain import EMPTY
from megatron_sfr.objectives.cross_entropy import CrossEntropy
from megatron_sfr.objectives.dft import DFT
from megatron_sfr.objectives.gem import GEM, GEMOptions
from megatron_sfr.objectives.sed import SED, SEDOptions
from megatron_sfr.objectives.token_loss import TokenObjective
from megatron_sfr.objectives.vocab import Rows, Vocab, combine

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
    """What came out of the two passes, and what the gradient is made of."""

    rows: Rows
    loss_T: Tensor
    spike_T: Tensor
    gradient_TV: Tensor  # of the real columns


def through(
    kernels: ModuleType, z_TV: Tensor, y_T: Tensor, objective: TokenObjective, *, size: int, shards: int
) -> Found:
    """Cuts the logits in equal shards, of which only the first `size` columns are real, and combines them for real.

    The loss and the gradient of the sum of the kept tokens' losses, each weighted by 1 + its row's number.
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
        rows = rows._replace(a_x=torch.zeros_like(rows.a_x))  # nobody asked for it
    closed = objective.close(rows)
    weight_T = torch.where(y_T >= 0, torch.arange(1, T + 1, device=y_T.device), 0).to(dtype)
    scale_T, spike_T = (torch.where(y_T >= 0, x * weight_T, 0) for x in (closed.scale, closed.spike))
    for z, y in zip(shards_z, shards_y, strict=True):
        kernels.write_gradient(z, y, rows.m, z_y_T, scale_T, spike_T, beta=scan.beta, c=scan.c)
    return Found(rows, torch.where(y_T >= 0, closed.loss, 0), spike_T, z_TV[:, :size])


def worst(found: Found, exact: Found, *, truncates: bool = False) -> dict[str, float]:
    """Largest error of each quantity in units of what it may be: everything at most 1, NaN fails. exact: in float64.

    Sums are right to 1e-5 of their size. A gradient is a product of an exponential, off by 2^-23 |x| / beta of its size
    for an exponent down to -87 in fp32, so by 2e-5; of a difference at the label, off by 1e-6 of the minuend; and it is
    rounded once to the logits' dtype (or cut off, which is a whole unit in its last place instead of half a one).
    """
    kind = torch.finfo(found.gradient_TV.dtype)
    pairs = zip(Rows._fields, found.rows, exact.rows, strict=True)
    ratios = {name: _ratio(x, y, 1e-5 * y.abs()) for name, x, y in pairs if y.numel()}
    ratios["loss"] = _ratio(found.loss_T, exact.loss_T, 1e-5 * (1 + exact.loss_T.abs() + exact.rows.x_y.abs()))
    wanted_TV = exact.gradient_TV
    unit = kind.eps if truncates else kind.eps / 2
    rounding = (unit + 2e-5) * wanted_TV.abs() + max(kind.smallest_normal * kind.eps, 1e-37)
    ratios["gradient"] = _ratio(found.gradient_TV, wanted_TV, rounding + 1e-6 * exact.spike_T.abs()[:, None])
    return ratios


def _ratio(x: Tensor, y: Tensor, bound: Tensor) -> float:
    error = (x.double().clamp(min=EMPTY) - y.double().clamp(min=EMPTY)).abs()
    return torch.where(error == 0, 0, error / bound).max().item()
