"""Mutual information and relative entropy, in nats, from the estimation errors of flow velocities.

I-MMSE (Guo, Shamai, Verdu 2005; Verdu 2010 for two distributions), on the straight path x_t = (1 - t) x_0 + t x_1.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.flow.path import interpolate
from megatron_sfr.flow.solver import Velocity


def quadrature(nodes: int, end: float = 1.0) -> tuple[Tensor, Tensor]:
    """Times in (0, end) and weights of Gauss-Legendre quadrature, float64 [nodes] each."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(end * (points + 1) / 2), torch.from_numpy(end * weights / 2)


def information(excess: Callable[[Tensor], Tensor], nodes: int = 64, end: float = 1.0) -> Tensor:
    """int_0^end excess(t) t / (1 - t) dt in nats: [...]. excess(t), for scalar t, is summed over dimensions: [...].

    excess = L(t) - L(t | h) gives the mutual information I(h; x_1) for end = 1; excess = E|v_p - v_q|^2 under p gives
    D(p || q).
    """
    t, dt = quadrature(nodes, end)
    return sum((excess(t_i) * dt_i * t_i / (1 - t_i) for t_i, dt_i in zip(t, dt, strict=True)), torch.zeros(()))


def relative_entropy(p: Velocity, q: Velocity, x_1: Tensor, x_0: Tensor, *, nodes: int, end: float) -> Tensor:
    """D(p || q) in nats up to t = end, [...]: mean over S samples x_1 [..., S, D] of p, with x_0 [..., S, D] ~ N(0, I).

    Choose end < 1. Exact velocities converge to each other as t -> 1, but a learned velocity keeps a constant error,
    and t / (1 - t) is not integrable up to 1. The result omits the contribution of t > end.
    """

    def excess(t: Tensor) -> Tensor:
        t = torch.full_like(x_1[..., :1], t.item())
        x_t, _ = interpolate(x_0, x_1, t)
        return (p(x_t, t) - q(x_t, t)).square().sum(-1).mean(-1).double()

    return information(excess, nodes, end)


def gaussian_velocity(mean_D: Tensor, std_D: Tensor) -> Velocity:
    """v* of data N(mean, diag(std^2)): mean + (t std^2 - (1 - t)) / (t^2 std^2 + (1 - t)^2) (x - t mean)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        square = std_D.square()
        return mean_D + (t * square - (1 - t)) / (t.square() * square + (1 - t).square()) * (x - t * mean_D)

    return velocity
