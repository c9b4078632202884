"""Token losses over a complete or sharded vocabulary, with their gradients.

Shapes: T tokens, V columns of the local shard.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sfr.kernels import choose
from megatron_sfr.kernels.vocab_parallel import Vocab, combine
from megatron_sfr.objectives.token.autograd_form import evaluate_blocks, write_blocks
from megatron_sfr.objectives.token.closed_form import TokenValues, first_pass, sum_dtype, write_gradient
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, TokenLoss


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TV: Tensor, y_T: Tensor, loss: ClosedFormLoss, vocab: Vocab, overwrite: bool
    ) -> tuple[Tensor, ...]:
        first = first_pass(z_TV, y_T, loss, vocab)
        result = first.result
        coefficients = result.softmax_coef, result.label_coef, first.columns_TC
        ctx.save_for_backward(z_TV, y_T, first.stats.m, first.z_y_T, *coefficients)
        ctx.loss, ctx.vocab, ctx.overwrite = loss, vocab, overwrite
        ctx.mark_non_differentiable(*first.values[1:])
        return tuple(first.values)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        z_TV, y_T, m_T, z_y_T, softmax_coef_T, label_coef_T, columns_TC = ctx.saved_tensors
        g_TV = z_TV if ctx.overwrite else z_TV.clone()
        columns_TC = None if columns_TC is None else columns_TC * grad_T[:, None]
        coefficients = softmax_coef_T * grad_T, label_coef_T * grad_T, columns_TC
        write_gradient(g_TV, y_T, m_T, z_y_T, *coefficients, ctx.loss, ctx.vocab)
        return g_TV, None, None, None, None


class _AutogradForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab, overwrite: bool
    ) -> tuple[Tensor, ...]:
        values = evaluate_blocks(z_TV, y_T, loss, vocab)
        ctx.save_for_backward(z_TV, y_T)
        ctx.loss, ctx.vocab, ctx.overwrite = loss, vocab, overwrite
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        z_TV, y_T = ctx.saved_tensors
        g_TV = z_TV if ctx.overwrite else z_TV.clone()
        write_blocks(g_TV, y_T, grad_T, ctx.loss, ctx.vocab)
        return g_TV, None, None, None, None


def token_values(z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab, *, overwrite: bool = False) -> TokenValues:
    """The loss of each token, and other values that the same pass over the logits computes (not differentiable).

    Args:
        z_TV: logits of this shard, any floating dtype.
        y_T: int64 labels in the whole vocabulary. Negative labels are ignored: loss and gradient are exactly 0.
        overwrite: whether the backward pass writes the gradient over the logits; nothing else may then read them.
    """
    form: Any = _ClosedForm if isinstance(loss, ClosedFormLoss) else _AutogradForm
    return TokenValues(*form.apply(z_TV, y_T, loss, vocab, overwrite))


def vocab_parallel_loss(
    z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss and the cross-entropy (not differentiable) of `token_values`."""
    values = token_values(z_TV, y_T, loss, vocab, overwrite=overwrite)
    return values.loss, values.cross_entropy


def check_loss(loss: object) -> None:
    """ValueError for what is not a loss, such as a name or a class."""
    if not isinstance(loss, TokenLoss):
        raise ValueError(f"loss is {loss!r}: give an instance of a TokenLoss, such as GEM(beta=0.7)")


def token_loss(
    logits: Tensor,
    labels: Tensor,
    loss: TokenLoss,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss and the cross-entropy of each token, over a complete or vocab-parallel vocabulary.

    The gradient flows through the loss; the cross-entropy is for logging. On CUDA the losses of this package run in
    fused kernels. Sums are in fp32 (float64 for float64 logits).

    Args:
        logits: this rank's columns of the logits, [..., V], any floating dtype. With a group of R ranks, rank r holds
            the columns from r V on.
        labels: int64 token ids in the whole vocabulary, [...]. Tokens with a negative label are ignored: their loss and
            gradient are exactly 0.
        loss: a loss of this package, such as `GEM(beta=0.7)`, or your own `TokenLoss`.
        group: the tensor-parallel group that shares the vocabulary. Default: this rank has all columns.
        vocab_size: number of tokens without padding; columns from there on are never read. Default: all columns.
        overwrite: whether backward writes the gradient over the logits, to save memory. Nothing else may read the
            logits then, and backward can run once.

    Returns:
        (loss, cross_entropy), [...] each, equal on all ranks of the group.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, vocab_size exceeds the columns, a label on the CPU exceeds the
            vocabulary, or this process is not in the group.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> logits, labels = torch.zeros(2, 3, 8, requires_grad=True), torch.tensor([[1, 5, -100], [0, 7, 2]])
        >>> loss, cross_entropy = sfr.token_loss(logits, labels, sfr.GEM(beta=0.7))
        >>> loss.shape, loss[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> (loss.sum() / (labels >= 0).sum()).backward()
        >>> logits.grad.shape
        torch.Size([2, 3, 8])
    """
    if logits.shape[:-1] != labels.shape or labels.dtype != torch.int64 or not logits.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype} and labels {tuple(labels.shape)} {labels.dtype} do not fit: "
            "give floating logits [..., V] and int64 labels [...]"
        )
    if logits.device != labels.device:
        raise ValueError(f"logits are on {logits.device} and labels on {labels.device}: move them to one device")
    check_loss(loss)
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if rank < 0:
        raise ValueError("this process is not in the group: give the tensor-parallel group that it belongs to")
    columns = logits.shape[-1] * ranks
    size = columns if vocab_size is None else vocab_size
    if not 1 <= size <= columns:
        raise ValueError(f"vocab_size is {vocab_size}; the logits have {columns} columns, so give 1 to {columns}")
    if labels.is_cpu and labels.numel() and int(labels.max()) >= size:  # a GPU would have to wait for the answer
        raise ValueError(
            f"a label is {int(labels.max())}, and the vocabulary has {size} tokens; give -100 to ignore one"
        )
    vocab = Vocab(size, rank * logits.shape[-1], group if ranks > 1 else None)
    z_TV, y_T = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss_T, cross_entropy_T = vocab_parallel_loss(z_TV, y_T, loss, vocab, overwrite=overwrite)
    return loss_T.view(labels.shape), cross_entropy_T.view(labels.shape)


@torch.no_grad()
def entropy_and_max_prob(z_TV: Tensor, vocab: Vocab) -> tuple[Tensor, Tensor]:
    """Entropy in nats and largest probability of each token's distribution: fp32 (or float64) [T] each.

    With x_i = z_i - m and u = sum_i exp(x_i) the largest probability is 1 / u.
    """
    real_TV = vocab.real(z_TV)
    none_T = torch.full((len(z_TV),), -1, dtype=torch.int64, device=z_TV.device)
    zero_T = z_TV.new_zeros(len(z_TV), dtype=sum_dtype(z_TV))
    stats_TN = choose(z_TV).row_statistics(real_TV, none_T, zero_T, beta=1.0, moments=False, c=0.0, top_k=0)
    stats = combine(vocab.gather(stats_TN), 1.0)
    return stats.entropy, 1 / stats.u


@torch.no_grad()
def logit_gradient(z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab) -> Tensor:
    """Gradient of the summed loss with respect to the logits: [T, V], in their dtype. The logits do not change."""
    g_TV = z_TV.clone()
    loss_and_gradient(g_TV, y_T, loss, vocab)
    return g_TV


@torch.no_grad()
def loss_and_gradient(
    z_TV: Tensor, y_T: Tensor, loss: TokenLoss, vocab: Vocab, factor: Tensor | float = 1.0
) -> TokenValues:
    """The values of each token; overwrites the logits with the gradient.

    Args:
        factor: the gradient is that of the summed loss times this number (a tensor without dimensions, or a float).
    """
    if not isinstance(loss, ClosedFormLoss):
        values = evaluate_blocks(z_TV, y_T, loss, vocab)
        write_blocks(z_TV, y_T, torch.ones_like(values.loss) * factor, loss, vocab)
        return values
    first = first_pass(z_TV, y_T, loss, vocab)
    columns_TC = None if first.columns_TC is None else first.columns_TC * factor
    coefficients = first.result.softmax_coef * factor, first.result.label_coef * factor, columns_TC
    write_gradient(z_TV, y_T, first.stats.m, first.z_y_T, *coefficients, loss, vocab)
    return first.values
