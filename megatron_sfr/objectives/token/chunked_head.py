"""LM head and token loss over chunks of positions, so that the logits of one chunk exist at a time.

The forward pass computes the logits of a chunk, its losses, and at once what the chunk adds to the gradients of the
hidden states and of the head's weight. The loss is one sum, whose gradient is one number: the backward pass multiplies
by it.
Shapes: T positions, N positions that get logits, C positions of a chunk, H hidden size, V columns of the shard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.closed_form import TokenValues, sum_dtype
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.token_loss import loss_and_gradient, token_values

UNEXPECTED = (
    "the loss did not receive the gradient for which the chunked LM head has accumulated that of its weight: "
    "set loss_chunk_tokens to 0"
)
BLOCK_ROWS = 4096
"""Positions whose gradient is scaled at a time."""
BLOCK_BYTES = 32 << 20
"""Size of a block of the weight's gradient that is rounded to the dtype of the logits before it is added in fp32."""


@dataclass(frozen=True)
class LMHead:
    """The output layer."""

    project: Callable[[Tensor], Tensor]
    """Hidden states [C, H] to new logits [C, V], without autograd. It must call the module, so that its hooks run: they
    may wait until the weight is up to date."""
    weight_VH: Tensor
    """This shard's rows of the weight; only read after `project`."""
    vocab: Vocab
    scale: Callable[[Tensor], Tensor] = lambda x: x
    """Multiplication by the constant that logits are scaled by."""
    accumulator_VH: Tensor | None = None
    """Where the forward pass adds the weight's gradient, such as Megatron's `main_grad`. The backward pass must then
    receive exactly `ChunkPlan.factor`. None: the gradient is kept, in fp32, and returned by the backward pass."""


@dataclass(frozen=True)
class ChunkPlan:
    """What one pass over the positions computes."""

    chunk: int
    """Largest number of positions of a chunk."""
    gradient: bool = True
    """Whether to compute gradients at all."""
    counts: bool = True
    """Whether the loss has a weight above 0. If not, the weight's gradient is not computed and the backward pass
    returns 0."""
    factor: Tensor | float = 1.0
    """The gradient that the loss is expected to receive, such as fp16's loss scale. Gradients are computed for it."""
    on_logits: Callable[[Tensor], None] | None = None
    """Called with the logits [C, V] of each chunk before they are overwritten."""
    on_gradient: Callable[[Tensor], None] | None = None
    """Called with this shard's gradient [C, H] of the hidden states, times `factor`."""


class _Gradients(NamedTuple):
    hidden_TH: Tensor | None
    weight_VH: Tensor | None


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TH: Tensor,
        weight_VH: Tensor,
        index_N: Tensor,
        y_N: Tensor,
        loss: TokenLoss,
        head: LMHead,
        plan: ChunkPlan,
    ) -> tuple[Tensor, ...]:
        values, gradients = _pass(h_TH, index_N, y_N, loss, head, plan)
        ctx.zeros = h_TH.new_zeros(()).expand_as(h_TH), weight_VH.new_zeros(()).expand_as(weight_VH)
        ctx.gradients, ctx.plan, ctx.accumulates = gradients, plan, head.accumulator_VH is not None
        ctx.mark_non_differentiable(*values)
        return values.loss.sum(), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of the chunked LM head can run once")
        dh_TH, dw_VH = ctx.gradients
        ctx.gradients = None
        zero_TH, zero_VH = ctx.zeros
        if not ctx.needs_input_grad[1]:
            zero_VH = None
        if not ctx.plan.counts:
            torch._assert_async(grad == 0, "the chunked LM head expected a loss of weight 0")
            return zero_TH, zero_VH, *[None] * 5
        assert dh_TH is not None
        if ctx.accumulates:
            # Every parameter in Megatron's buckets needs a gradient: zeros, as the sum is in the accumulator already.
            torch._assert_async((grad == ctx.plan.factor).all(), UNEXPECTED)
            return dh_TH, zero_VH, *[None] * 5
        ratio_1 = (grad / ctx.plan.factor).view(1)  # with a dimension, so that the products below are in fp32
        for block in dh_TH.split(BLOCK_ROWS):
            block.copy_(block * ratio_1)
        return dh_TH, dw_VH.mul_(ratio_1).to(zero_VH.dtype) if dw_VH is not None else zero_VH, *[None] * 5


def chunked_loss(
    h_TH: Tensor, index_N: Tensor, y_N: Tensor, loss: TokenLoss, head: LMHead, plan: ChunkPlan
) -> tuple[Tensor, TokenValues]:
    """The summed loss of some positions, and the values of each, which are not differentiable.

    The number of positions is a shape, so that nothing waits for the device. Chunks are of nearly equal size; without
    positions there is one, of size 0, so that the head is always called.

    Args:
        h_TH: hidden states of all positions, on each rank that shares the vocabulary. Their gradient is this rank's
            part, from its columns.
        index_N: the positions that get logits, int64, without repetition. Gradients of other positions are 0.
        y_N: their labels, int64; negative ones are ignored.
    Returns:
        (sum, values): [] and [N] each, in fp32 (float64 for float64 logits).
    """
    total, *values = _ChunkedLoss.apply(h_TH, head.weight_VH, index_N, y_N, loss, head, plan)
    return total, TokenValues(*values)


def _pass(
    h_TH: Tensor, index_N: Tensor, y_N: Tensor, loss: TokenLoss, head: LMHead, plan: ChunkPlan
) -> tuple[TokenValues, _Gradients]:
    weight = head.weight_VH
    dh_TH, dw_VH = torch.zeros_like(h_TH) if plan.gradient else None, None
    trains = plan.gradient and plan.counts and weight.requires_grad
    if trains and head.accumulator_VH is None:
        dw_VH = torch.zeros_like(weight, dtype=sum_dtype(weight))
    total_VH = (dw_VH if head.accumulator_VH is None else head.accumulator_VH) if trains else None
    chunks = max(1, math.ceil(len(index_N) / plan.chunk))
    found = []
    parts = index_N.tensor_split(chunks), y_N.tensor_split(chunks), loss.split(chunks)
    for rows_C, y_C, loss_C in zip(*parts, strict=True):
        h_CH = h_TH[rows_C]
        z_CV = head.scale(head.project(h_CH))
        if plan.on_logits is not None:
            plan.on_logits(z_CV)
        if dh_TH is None:
            found.append(token_values(z_CV, y_C, loss_C, head.vocab))
            continue
        found.append(loss_and_gradient(z_CV, y_C, loss_C, head.vocab, plan.factor))
        dh_CH = head.scale(z_CV @ weight)
        dh_TH.index_copy_(0, rows_C, dh_CH)
        if plan.on_gradient is not None:
            plan.on_gradient(dh_CH)
        if total_VH is not None:
            _add_product(total_VH, z_CV, head.scale(h_CH))
        del z_CV
    return TokenValues(*map(torch.cat, zip(*found, strict=True))), _Gradients(dh_TH, dw_VH)


def _add_product(total_VH: Tensor, g_CV: Tensor, h_CH: Tensor) -> None:
    """total += g^T h. The product is in the dtype of g, as upstream's is; the sum is in that of the total."""
    if total_VH.dtype == g_CV.dtype:
        total_VH.addmm_(g_CV.t(), h_CH)
        return
    step = max(1, BLOCK_BYTES // max(1, h_CH.shape[1] * h_CH.element_size()))
    for rows_VH, g_CB in zip(total_VH.split(step), g_CV.split(step, dim=1), strict=True):
        rows_VH += g_CB.t() @ h_CH
