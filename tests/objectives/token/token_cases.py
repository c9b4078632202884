"""All registered token losses in their settings for tests, with logits and labels. `ALL_LOSSES` serves every test.

Shapes: T tokens, V columns, K tokens of a reference.
"""

import torch
from torch import Tensor

import megatron_sfr.objectives.token  # registers the losses of this package  # noqa: F401
import tests.objectives.token.focal  # a loss in plain torch  # noqa: F401
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.anchored.asft import ASFT
from megatron_sfr.objectives.anchored.reference import Reference
from megatron_sfr.objectives.token.loss_base import IGNORED, ClosedFormLoss, TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss


def all_losses() -> dict[str, TokenLoss]:
    """Every registered loss in each of its settings for tests: {label: loss}.

    Not ASFT, which is a loss of tokens with a reference distribution each; it has tests/objectives/anchored.
    """
    found = {label: loss for registered in LOSSES.values() for label, loss in registered.instances().items()}
    return {label: loss for label, loss in found.items() if not isinstance(loss, ASFT)}


ALL_LOSSES = all_losses()
CLOSED_FORM_LOSSES = {label: loss for label, loss in ALL_LOSSES.items() if isinstance(loss, ClosedFormLoss)}


def logits(tokens: int, columns: int, *, seed: int = 0, scale: float = 2.0, grid: bool = False) -> Tensor:
    """Normal float64 logits [T, V]; on a grid many logits of a token are equal, including the largest."""
    z_TV = scale * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z_TV / scale).round() if grid else z_TV


def labels(tokens: int, size: int, *, seed: int = 0, ignored: float = 0.0) -> Tensor:
    """Random labels [T], some of them ignored."""
    g = torch.Generator().manual_seed(seed + 1)
    y_T = torch.randint(size, (tokens,), generator=g)
    return torch.where(torch.rand(tokens, generator=g) < ignored, IGNORED, y_T)


def reference(tokens: int, size: int, k: int, *, seed: int = 0) -> Reference:
    """The k most likely of `size` tokens by random logits, and the rest, in float64."""
    log_p_TV = logits(tokens, size, seed=seed + 50).log_softmax(-1)
    log_p_TK, token_TK = log_p_TV.topk(k)
    rest_T1 = log_p_TV.scatter(1, token_TK, -torch.inf).logsumexp(-1, keepdim=True)
    return Reference(token_TK, torch.cat([log_p_TK, rest_T1], dim=-1))


def differentiated(
    z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab | None = None, weight_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [T], cross-entropy [T] and the gradient [T, V] of the loss's sum, weighted if weights are given."""
    z_TV = z_TV.detach().clone().requires_grad_()
    loss_T, cross_entropy_T = vocab_parallel_loss(z_TV, y_T, loss, vocab or Vocab(z_TV.shape[1]))
    (loss_T if weight_T is None else loss_T * weight_T).sum().backward()
    assert z_TV.grad is not None
    return loss_T.detach(), cross_entropy_T, z_TV.grad


def by_definition(z_TV: Tensor, y_T: Tensor, loss: TokenLoss) -> tuple[Tensor, Tensor]:
    """The loss [T] in plain torch and the gradient [T, V] of its sum, by autograd in the logits' dtype."""
    z_TV = z_TV.detach().clone().requires_grad_()
    loss_T = loss.loss(z_TV, y_T)
    return loss_T.detach(), torch.autograd.grad(loss_T.sum(), z_TV)[0]
