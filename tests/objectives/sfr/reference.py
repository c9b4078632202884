"""SFR's loss as the authors' public code computes it, written from a description of that code, in plain torch.

ids, labels: one row; labels are ids where the row is supervised, and -100 elsewhere. H hidden size, d embedding
dimension. h_i is the last hidden state at input i.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

STRIDE, WINDOW, SHORTEST = 32, 256, 16
Row = tuple[np.ndarray, np.ndarray]


def row_targets(ids: np.ndarray, labels: np.ndarray, decode: Callable, encode: Callable) -> tuple[Tensor, Tensor]:
    """Targets [N, d] of a row's supervised tokens, in order, and which of them have a window: bool [N].

    An anchor is every 32nd supervised token of the row. Its window is the next 256 supervised tokens, if there are
    at least 16. Another token has the target of the nearest anchor that has a window, a row without one zeros.
    """
    tokens = [int(id) for id, label in zip(ids, labels, strict=True) if label != -100]
    N, windows = len(tokens), {}
    for t in range(0, N, STRIDE):
        suffix = tokens[t + 1 : t + 1 + WINDOW]
        if len(suffix) >= SHORTEST:
            windows[t] = encode(decode(suffix))
    if not windows:
        return torch.zeros(N, len(encode("a")), dtype=torch.float64), torch.zeros(N, dtype=torch.bool)
    nearest = [min(windows, key=lambda anchor: abs(anchor - t)) for t in range(N)]
    return torch.stack([windows[t] for t in nearest]), torch.ones(N, dtype=torch.bool)


def velocity(weights: dict[str, Tensor], z: Tensor, tau: Tensor, h: Tensor) -> Tensor:
    """v_hat [N, d] of z [N, d], tau of the sequence and h [N, H], by a head of one residual block."""
    d = z.shape[-1]
    half = d // 2
    frequency = torch.tensor([10000.0 ** -(k / (half - 1)) for k in range(half)], dtype=tau.dtype)
    # Sines first, as in our code: another order only permutes the inputs, and so the weights, of a Linear.
    temb = torch.cat([(tau * frequency).sin(), (tau * frequency).cos()])
    temb = weights["time_in.weight"] @ temb + weights["time_in.bias"]
    temb = weights["time_out.weight"] @ (temb * temb.sigmoid()) + weights["time_out.bias"]
    first = torch.cat([weights[f"input_{part}.weight"] for part in "xth"], dim=1)
    x = torch.cat([z, temb.expand(len(z), d), h], dim=1) @ first.T + weights["input_x.bias"]
    x = silu_of_norm(x, weights["norm.weight"], weights["norm.bias"])
    inner = x @ weights["blocks.0.linear.weight"].T + weights["blocks.0.linear.bias"]
    x = x + silu_of_norm(inner, weights["blocks.0.norm.weight"], weights["blocks.0.norm.bias"])
    return x @ weights["output.weight"].T + weights["output.bias"]


def silu_of_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    x = gain * (x - mean) / (variance + 1e-5).sqrt() + shift
    return x * x.sigmoid()


def authors_loss(
    weights: dict[str, Tensor],
    rows: list[Row],
    h: list[Tensor],
    noise: Callable[[int, np.ndarray], tuple[Tensor, Tensor]],
    decode: Callable,
    encode: Callable,
    *,
    zero_targets: bool,
) -> Tensor:
    """sum w l / max(1, sum w) over the rows of a microbatch, with w = (N - t) / N of the t-th supervised token, from 0.

    h: [S, H] of each row. noise: number of a row and the positions of its supervised tokens -> z_0 [N, d] and tau.
    zero_targets: as their code is; otherwise tokens of a row without a window have no loss.
    """
    total, weight = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for number, ((ids, labels), h_SH) in enumerate(zip(rows, h, strict=True)):
        positions = np.flatnonzero(labels != -100)
        z_1, valid = row_targets(ids, labels, decode, encode)
        z_0, tau = noise(number, positions)
        v_hat = velocity(weights, tau * z_1 + (1 - tau) * z_0, tau, h_SH[positions])
        l = (v_hat - (z_1 - z_0)).square().mean(-1)
        N = len(positions)
        w = (N - torch.arange(N, dtype=torch.float64)) / N
        if not zero_targets:
            w = w * valid
        total, weight = total + (w * l).sum(), weight + w.sum()
    return total / weight.clamp(min=1)
