"""The two passes over the logits, fused in Triton: one program per row, which reads the row once in 16-byte loads.

Each of 256 lanes accumulates every 256th 16-byte chunk of the row relative to its own maximum, so lanes synchronize
only at the end of the row. Memory traffic is minimal: 2 bytes per bf16 logit forward, 4 backward.
`plain` defines what is computed. Shapes: T tokens, V real columns of the shard, L lanes, C columns per lane.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernel arguments are Triton types, which Python annotations cannot name.

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sfr.kernels import plain
from megatron_sfr.runtime.devices import launching_on

EMPTY = tl.constexpr(plain.EMPTY)
LOG2E = tl.constexpr(1.4426950408889634)
LANES = 256
NUM_WARPS = 4  # of 32 threads: 2 lanes per thread, and enough rows per multiprocessor to hide memory latency


@triton.jit
def _add(sums, z_LC, z_y, k, c, MOMENTS: tl.constexpr, HAS_C: tl.constexpr):
    """Adds a tile's columns to the lanes' (m, u, u_x, s, a, a_x); k = log2(e) / beta, c in units of log2(e).

    When the maximum grows from m to m', with d = m - m', the moment a_x about m becomes (a_x + d a) exp(d / beta), and
    u_x likewise.
    """
    m, u, u_x, s, a, a_x = sums
    top_L = tl.maximum(m, tl.max(z_LC, 1))
    d = m - top_L
    x_LC = z_LC - top_L[:, None]
    p_LC, q = tl.exp2(x_LC * LOG2E), tl.exp2(d * LOG2E)
    finite_LC = tl.maximum(x_LC, EMPTY)  # also for z = -inf, where p and e are 0
    u_x = (u_x + d * u) * q + tl.sum(p_LC * finite_LC, 1)
    u = u * q + tl.sum(p_LC, 1)
    if MOMENTS:
        r = tl.exp2(d * k)
        e_LC = tl.exp2(x_LC * k)
        s_before, s = s, s * r + tl.sum(e_LC, 1)
        if HAS_C:
            e_LC = e_LC / (1 + tl.exp2((z_y - z_LC) * c))
            a_x = (a_x + d * a) * r
            a = a * r + tl.sum(e_LC, 1)
        else:
            a_x = (a_x + d * s_before) * r
        a_x += tl.sum(e_LC * finite_LC, 1)
    return top_L, u, u_x, s, a, a_x


@triton.jit
def _keep_largest(top_K, z_LC, K: tl.constexpr):
    """The K largest of the values kept so far and of a tile, ties included; unused slots hold +inf."""
    z_N = tl.reshape(z_LC, (z_LC.shape[0] * z_LC.shape[1],), can_reorder=True)
    largest, index = tl.max(z_N, 0, return_indices=True)
    smallest, slot = tl.min(top_K, 0, return_indices=True)
    while largest > smallest:
        top_K = tl.where(tl.arange(0, K) == slot, largest, top_K)
        z_N = tl.where(tl.arange(0, z_N.shape[0]) == index, float("-inf"), z_N)
        largest, index = tl.max(z_N, 0, return_indices=True)
        smallest, slot = tl.min(top_K, 0, return_indices=True)
    return top_K


@triton.jit
def _row_statistics(
    z_ptr, y_ptr, z_y_ptr, stats_ptr, stride, V, k, c,
    MOMENTS: tl.constexpr, HAS_C: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # T V can exceed 2^31
    z_ptr += row * stride
    stats_ptr += row * (7 + TOP_K)
    z_y = 0.0
    if HAS_C:
        z_y = tl.load(z_y_ptr + row)
    column_LC = tl.arange(0, L)[:, None] * C + tl.arange(0, C)[None, :]
    nothing_L = tl.zeros((L,), tl.float32)
    sums = (nothing_L + EMPTY, nothing_L, nothing_L, nothing_L, nothing_L, nothing_L)
    top_K = tl.where(tl.arange(0, K) < TOP_K, EMPTY, float("inf"))
    tiled = V // (L * C) * (L * C)
    for start in range(0, tiled, L * C):  # unmasked: a mask would split the loads of an odd V into single columns
        z_LC = tl.load(z_ptr + (start + column_LC)).to(tl.float32)
        sums = _add(sums, z_LC, z_y, k, c, MOMENTS, HAS_C)
        if TOP_K:
            top_K = _keep_largest(top_K, z_LC, K)
    z_LC = tl.load(z_ptr + (tiled + column_LC), mask=tiled + column_LC < V, other=float("-inf")).to(tl.float32)
    m_L, u, u_x, s, a, a_x = _add(sums, z_LC, z_y, k, c, MOMENTS, HAS_C)
    m = tl.max(m_L, 0)
    d = m_L - m
    q = tl.exp2(d * LOG2E)
    sum_u = tl.sum(u * q, 0)
    sum_s, sum_a, sum_a_x = sum_u, sum_u, 0.0
    if MOMENTS:
        if not HAS_C:
            a = s
        r = tl.exp2(d * k)
        sum_s, sum_a, sum_a_x = tl.sum(s * r, 0), tl.sum(a * r, 0), tl.sum((a_x + d * a) * r, 0)
    y = tl.load(y_ptr + row)
    tl.store(stats_ptr, m)
    tl.store(stats_ptr + 1, sum_u)
    tl.store(stats_ptr + 2, sum_s)
    tl.store(stats_ptr + 3, sum_a)
    tl.store(stats_ptr + 4, sum_a_x)
    own = tl.load(z_ptr + y, mask=y >= 0, other=0.0).to(tl.float32)
    tl.store(stats_ptr + 5, tl.where(y >= 0, own, EMPTY))
    tl.store(stats_ptr + 6, tl.sum((u_x + d * u) * q, 0))
    if TOP_K:
        top_K = _keep_largest(top_K, z_LC, K)
        top_K = tl.sort(tl.where(tl.arange(0, K) < TOP_K, top_K, float("-inf")), descending=True)
        tl.store(stats_ptr + 7 + tl.arange(0, K), top_K, mask=tl.arange(0, K) < TOP_K)


@triton.jit
def _write_tile(z_ptr, column, y, m, z_y, softmax_coef, label_coef, k, c, mask, HAS_C: tl.constexpr):
    z = tl.load(z_ptr + column, mask=mask).to(tl.float32)
    g = softmax_coef * tl.exp2((z - m) * k)
    if HAS_C:
        g = g / (1 + tl.exp2((z_y - z) * c))
    g = tl.where(column == y, g - label_coef, g)
    tl.store(z_ptr + column, g.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _write_gradient(
    z_ptr, y_ptr, m_ptr, z_y_ptr, softmax_coef_ptr, label_coef_ptr, stride, V, k, c,
    HAS_C: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    softmax_coef, label_coef = tl.load(softmax_coef_ptr + row), tl.load(label_coef_ptr + row)
    y, m = tl.load(y_ptr + row), tl.load(m_ptr + row)
    z_y = 0.0
    if HAS_C:
        z_y = tl.load(z_y_ptr + row)
    column = tl.arange(0, L * C)
    tiled = V // (L * C) * (L * C)
    if (softmax_coef != 0) | (label_coef != 0):
        for start in range(0, tiled, L * C):
            _write_tile(z_ptr, start + column, y, m, z_y, softmax_coef, label_coef, k, c, None, HAS_C)
        _write_tile(z_ptr, tiled + column, y, m, z_y, softmax_coef, label_coef, k, c, tiled + column < V, HAS_C)
    else:  # an ignored token: its logits are not read
        zero = tl.zeros((L * C,), z_ptr.dtype.element_ty)
        for start in range(0, tiled, L * C):
            tl.store(z_ptr + (start + column), zero)
        tl.store(z_ptr + (tiled + column), zero, mask=tiled + column < V)


def row_statistics(
    z_TV: Tensor, y_T: Tensor, z_y_T: Tensor, *, beta: float, moments: bool, c: float, top_k: int
) -> Tensor:
    """See `plain.row_statistics`. bf16, fp16 or fp32 logits, sums in fp32; float64 falls back to `plain`."""
    T, V = z_TV.shape
    if z_TV.dtype == torch.float64 or V == 0:
        return plain.row_statistics(z_TV, y_T, z_y_T, beta=beta, moments=moments, c=c, top_k=top_k)
    stats_TN = torch.empty(T, 7 + top_k, dtype=torch.float32, device=z_TV.device)
    if T:
        with launching_on(z_TV):
            _row_statistics[(T,)](
                *(z_TV, y_T.contiguous(), z_y_T.contiguous(), stats_TN, _row_stride(z_TV), V),
                *(float(LOG2E.value / beta), float(LOG2E.value * c)),
                MOMENTS=moments, HAS_C=moments and c > 0, TOP_K=top_k, K=triton.next_power_of_2(max(top_k, 1)),
                **_tile(z_TV),
            )  # fmt: skip
    return stats_TN


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
    """See `plain.write_gradient`. bf16, fp16 or fp32 logits, gradients rounded once; float64 falls back to `plain`."""
    T, V = z_TV.shape
    if z_TV.dtype == torch.float64 or V == 0:
        plain.write_gradient(z_TV, y_T, m_T, z_y_T, softmax_coef_T, label_coef_T, beta=beta, c=c)
    elif T:
        known = (x.contiguous() for x in (y_T, m_T, z_y_T, softmax_coef_T, label_coef_T))
        with launching_on(z_TV):
            _write_gradient[(T,)](
                *(z_TV, *known, _row_stride(z_TV), V, float(LOG2E.value / beta), float(LOG2E.value * c)),
                HAS_C=c > 0, **_tile(z_TV),
            )  # fmt: skip


def _row_stride(z_TV: Tensor) -> int:
    if z_TV.shape[1] > 1 and z_TV.stride(1) != 1:
        raise ValueError(f"logits with strides {z_TV.stride()}: the columns of a row must be contiguous")
    return z_TV.stride(0)


def _tile(z_TV: Tensor) -> dict[str, int]:
    return {"L": LANES, "C": 16 // z_TV.element_size(), "num_warps": NUM_WARPS}
