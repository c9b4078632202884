"""Every token objective with a reference loss as in its paper, and logits and labels for tests.

Shapes: T tokens, V columns.
"""

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.gem import GEM, GEMOptions
from megatron_sfr.objectives.token.sed import SED, SEDOptions
from megatron_sfr.objectives.token.token_loss import IGNORED, TokenObjective, token_loss

OBJECTIVES: dict[str, TokenObjective] = {
    "ce": CrossEntropy(),
    "gem-linear": GEM(GEMOptions(gem_beta=0.7)),
    "gem-logsigmoid": GEM(GEMOptions(gem_beta=0.6, gem_h="logsigmoid", gem_slope=0.4)),
    "sed": SED(SEDOptions(sed_weight=1.5, sed_top_k=3, sed_threshold=0.6123)),
    "dft": DFT(),
}


def written_loss(objective: TokenObjective, z_TV: Tensor, y_T: Tensor) -> Tensor:
    """The papers' losses, with stop-gradients where they have them, for autograd: [T]. No label is ignored."""
    log_p_TV = z_TV.log_softmax(-1)
    y_T1 = y_T[:, None]
    log_p_T = log_p_TV.gather(1, y_T1)[:, 0]
    match objective:
        case CrossEntropy():
            return -log_p_T
        case DFT():
            return -log_p_T.exp().detach() * log_p_T
        case GEM(o):
            q_TV = (z_TV / o.gem_beta).softmax(-1).detach()
            w_TV = torch.ones_like(z_TV)
            if o.gem_h == "logsigmoid":
                w_TV = (o.gem_slope * (z_TV - z_TV.gather(1, y_T1))).sigmoid().detach()
            return -(q_TV * w_TV * (log_p_T[:, None] - log_p_TV)).sum(1)
        case SED(o):
            k = min(o.sed_top_k, z_TV.shape[1])
            mask_T = (log_p_TV.exp().topk(k).values.sum(1) < o.sed_threshold).to(z_TV.dtype).detach()
            return -log_p_T + o.sed_weight * mask_T * (log_p_T.exp() - 0.5) ** 2
    raise AssertionError(objective)


def logits(tokens: int, columns: int, *, seed: int = 0, scale: float = 2.0, grid: bool = False) -> Tensor:
    """Normal float64 logits [T, V]; on a grid many logits of a row are equal, including the largest."""
    z_TV = scale * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z_TV / scale).round() if grid else z_TV


def labels(tokens: int, size: int, *, seed: int = 0, ignored: float = 0.0) -> Tensor:
    """Random labels [T], some of them ignored."""
    g = torch.Generator().manual_seed(seed + 1)
    y_T = torch.randint(size, (tokens,), generator=g)
    return torch.where(torch.rand(tokens, generator=g) < ignored, IGNORED, y_T)


def differentiated(
    z_TV: Tensor, y_T: Tensor, objective: TokenObjective, vocab: Vocab | None = None, weight_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [T], cross-entropy [T] and the gradient [T, V] of the loss's sum, weighted if weights are given."""
    z_TV = z_TV.detach().clone().requires_grad_()
    loss_T, cross_entropy_T = token_loss(z_TV, y_T, objective, vocab or Vocab(z_TV.shape[1]))
    (loss_T if weight_T is None else loss_T * weight_T).sum().backward()
    assert z_TV.grad is not None
    return loss_T.detach(), cross_entropy_T, z_TV.grad


def written(z_TV: Tensor, y_T: Tensor, objective: TokenObjective) -> tuple[Tensor, Tensor]:
    """The reference loss [T] and the gradient [T, V] of its sum, by autograd in the logits' dtype."""
    z_TV = z_TV.detach().clone().requires_grad_()
    loss_T = written_loss(objective, z_TV, y_T)
    return loss_T.detach(), torch.autograd.grad(loss_T.sum(), z_TV)[0]
