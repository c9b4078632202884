"""The two passes over the logits in plain torch, in blocks of rows whose fp32 copy fits into the processor's cache.

The logits are read twice and written once, and the only extra memory is the block.
Shapes: T tokens, V real columns of the local shard, B rows of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}  # fits into L2 together with the rows being read
EMPTY = -1e30


def row_statistics(
    z_TV: Tensor, y_T: Tensor, z_y_T: Tensor, *, beta: float, moments: bool, c: float, top_k: int
) -> Tensor:
    """[m, u, s, a, a_x, z_y, u_x, top_1 ... top_K] of each row: [T, 7 + K], fp32 (float64 for float64 logits).

    m = max z_i;  u = sum exp(x_i), x_i = z_i - m;  u_x = sum exp(x_i) x_i;  s = sum exp(x_i / beta);
    a = sum w_i exp(x_i / beta);  a_x = sum w_i exp(x_i / beta) x_i;  w_i = sigmoid(c (z_i - z_y)), or 1 where c = 0.
    All are over this shard. Without moments s = a = u and a_x = 0. z_y is -1e30 if the label is not in this shard
    (y = -1). In a shard without columns m and the top values are -1e30.

    Args:
        z_TV: logits; the row stride may exceed V.
        y_T: the label's column in this shard, or -1; int64.
        z_y_T: the label's logit from whichever shard holds it; read only if c > 0.
    """
    dtype = torch.float64 if z_TV.dtype == torch.float64 else torch.float32
    stats_TN = torch.zeros(len(z_TV), 7 + top_k, dtype=dtype, device=z_TV.device)
    stats_TN[:, 5] = EMPTY
    stats_TN[:, 7:] = EMPTY
    if z_TV.shape[1] == 0:
        stats_TN[:, 0] = EMPTY
        return stats_TN
    own_T = z_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0].to(dtype)
    stats_TN[:, 5] = torch.where(y_T >= 0, own_T, EMPTY)
    for rows, scratch_NBV in _blocks(z_TV, dtype, 2 + (c > 0)):
        _block_statistics(scratch_NBV, z_TV[rows], z_y_T[rows], stats_TN[rows], beta, moments, c, top_k)
    return stats_TN


def _block_statistics(
    scratch_NBV: Tensor, z_BV: Tensor, z_y_B: Tensor, stats_BN: Tensor, beta: float, moments: bool, c: float, top_k: int
) -> None:
    """Fills the statistics of one block of logits. scratch_NBV is scratch space in the dtype of the sums."""
    x_BV = scratch_NBV[0].copy_(z_BV)
    if top_k:
        top = x_BV.topk(min(top_k, x_BV.shape[1])).values
        stats_BN[:, 7 : 7 + top.shape[1]] = top
    m_B = x_BV.amax(1).clamp_(min=EMPTY)  # a shard whose logits are all -inf counts as one without columns
    x_BV -= m_B[:, None]
    stats_BN[:, 0] = m_B
    e_BV = torch.exp(x_BV, out=scratch_NBV[1])
    stats_BN[:, 1:4] = e_BV.sum(1)[:, None]
    stats_BN[:, 6] = e_BV.mul_(x_BV).nansum(1)  # skips 0 * -inf of masked logits; NaN logits show in u
    if not moments:
        return
    e_BV = torch.div(x_BV, beta, out=scratch_NBV[1]).exp_()
    stats_BN[:, 2:4] = e_BV.sum(1)[:, None]
    if c:
        e_BV *= torch.add(x_BV, (m_B - z_y_B)[:, None], out=scratch_NBV[2]).mul_(c).sigmoid_()
        stats_BN[:, 3] = e_BV.sum(1)
    stats_BN[:, 4] = e_BV.mul_(x_BV).nansum(1)


def write_gradient(
    z_TV: Tensor,
    y_T: Tensor,
    m_T: Tensor,
    z_y_T: Tensor,
    softmax_coef_T: Tensor,
    label_coef_T: Tensor,
    *,
    beta: float,
    c: float,
) -> None:
    """Overwrites the logits with softmax_coef w_i exp((z_i - m) / beta) - label_coef [i = y], rounded once.

    A row with softmax_coef = label_coef = 0 gets zeros, even if its logits are not finite.
    Takes the arguments of `row_statistics`, and m over the whole vocabulary.
    """
    dtype = torch.float64 if z_TV.dtype == torch.float64 else torch.float32
    if z_TV.shape[1] == 0:
        return
    for rows, scratch_NBV in _blocks(z_TV, dtype, 1 + (c > 0)):
        x_BV = torch.sub(z_TV[rows], m_T[rows, None], out=scratch_NBV[0])
        if c:
            w_BV = torch.add(x_BV, (m_T - z_y_T)[rows, None], out=scratch_NBV[1]).mul_(c).sigmoid_()
        if beta != 1:
            x_BV /= beta
        g_BV = x_BV.exp_().mul_(softmax_coef_T[rows, None])
        if c:
            g_BV *= w_BV
        y_B1 = y_T[rows, None]
        label_coef_B1 = torch.where(y_B1 >= 0, label_coef_T[rows, None], 0)
        g_BV.scatter_add_(1, y_B1.clamp(min=0), -label_coef_B1)
        z_TV[rows] = g_BV
    z_TV.index_fill_(0, ((softmax_coef_T == 0) & (label_coef_T == 0)).nonzero()[:, 0], 0)


def _blocks(z_TV: Tensor, dtype: torch.dtype, copies: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and scratch space for `copies` copies of a block.

    All blocks share the scratch space: allocating new pages would take longer than the sums.
    """
    T, V = z_TV.shape
    step = max(1, min(T, BLOCK_BYTES.get(z_TV.device.type, BLOCK_BYTES["cpu"]) // (V * dtype.itemsize)))
    scratch_NBV = z_TV.new_empty(copies, step, V, dtype=dtype)
    for start in range(0, T, step):
        stop = min(start + step, T)
        yield slice(start, stop), scratch_NBV[:, : stop - start]
