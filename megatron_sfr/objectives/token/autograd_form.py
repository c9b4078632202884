"""Losses in plain torch over a sharded vocabulary: gathers the logits of a block of tokens and differentiates there.

Every rank computes the loss of the whole vocabulary, as a single process would, and keeps its columns of the gradient.
Memory is that of one block: the backward pass gathers the logits again instead of keeping them.
Shapes: T tokens, B tokens of a block, V columns of the local shard, R ranks, N tokens of the whole vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.closed_form import TokenValues, sum_dtype
from megatron_sfr.objectives.token.loss_base import TokenLoss

BLOCK_BYTES = 64 << 20
"""Size of a block's gathered logits. Autograd keeps several tensors of this size."""


def evaluate_blocks(z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab) -> TokenValues:
    """The loss and the reported values of each token."""
    values_4T = torch.zeros(4, len(y_T), dtype=sum_dtype(z_TV), device=z_TV.device)
    with torch.no_grad():
        for block in _blocks(z_TV, vocab):
            z_BN, y_B = _gather(z_TV[block], vocab), y_T[block]
            kept_B, y_B = y_B >= 0, y_B.clamp(min=0)
            loss_B, z_y_B = _losses(loss, z_BN, y_B), z_BN.gather(1, y_B[:, None])[:, 0]
            correct_B, log_p_BN = z_y_B >= z_BN.amax(-1), z_BN.log_softmax(-1)
            entropy_B = -(log_p_BN.exp() * log_p_BN).nansum(-1)  # skips 0 * -inf of masked logits
            measured = (loss_B, z_BN.logsumexp(-1) - z_y_B, entropy_B, correct_B.to(z_BN.dtype))
            values_4T[:, block] = torch.where(kept_B, torch.stack(measured), 0)
    return TokenValues(*values_4T)


def write_blocks(g_TV: Tensor, y_T: Tensor, weight_T: Tensor, loss: TokenLoss, vocab: Vocab) -> None:
    """Overwrites a shard's logits with the gradient of sum_t weight_t L_t; 0 in padding columns and ignored tokens."""
    width = vocab.real(g_TV).shape[-1]
    for block in _blocks(g_TV, vocab):
        y_B = y_T[block]
        kept_B = y_B >= 0
        with torch.enable_grad():
            z_BN = _gather(g_TV[block], vocab).requires_grad_()
            loss_B = _losses(loss, z_BN, y_B.clamp(min=0))
        if not loss_B.requires_grad:
            raise ValueError(f"{type(loss).__name__}.loss does not depend on the logits, so it has no gradient")
        weight_B = torch.where(kept_B, weight_T[block], 0).to(loss_B.dtype)
        (g_BN,) = torch.autograd.grad(loss_B, z_BN, weight_B)
        g_BN = torch.where(kept_B[:, None], g_BN, 0)
        g_TV[block, :width] = g_BN[:, vocab.start : vocab.start + width].to(g_TV.dtype)
    g_TV[:, width:] = 0


def _losses(loss: TokenLoss, z_BN: Tensor, y_B: Tensor) -> Tensor:
    loss_B = loss.loss(z_BN, y_B)
    if loss_B.shape != y_B.shape:
        shape, name = tuple(loss_B.shape), type(loss).__name__
        raise ValueError(f"{name}.loss returned shape {shape} for {len(y_B)} tokens: return one loss per token, [T]")
    return loss_B


def _gather(z_BV: Tensor, vocab: Vocab) -> Tensor:
    """The block's logits over the whole vocabulary, without padding: a new tensor [B, N], fp32 (or float64)."""
    z_RBV = vocab.gather(z_BV.detach())
    return z_RBV.transpose(0, 1).flatten(1)[:, : vocab.size].to(sum_dtype(z_BV), copy=True)


def _blocks(z_TV: Tensor, vocab: Vocab) -> Iterator[slice]:
    """Blocks of tokens, equal on all ranks."""
    step = max(1, BLOCK_BYTES // (max(vocab.size, 1) * sum_dtype(z_TV).itemsize))
    for start in range(0, len(z_TV), step):
        yield slice(start, start + step)
