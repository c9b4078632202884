"""Closed forms of optimal velocities of the straight path, and of their losses, in any dtype."""

import numpy as np
import torch
from torch import Tensor


def gaussian_mixture_velocity(x: Tensor, t: Tensor, w: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t = x] for x_0 ~ N(0, I) and x_1 ~ sum_j w_j N(mu_j, s_j^2 I).

    With var_j = t^2 s_j^2 + (1 - t)^2 and r_j proportional to w_j N(x; t mu_j, var_j I):
    v* = sum_j r_j [mu_j + (t s_j^2 - (1 - t)) / var_j (x - t mu_j)].  x: [..., D], t: [..., 1], w, s: [J], mu: [J, D].
    """
    t = t[..., None]
    var = t**2 * s[:, None] ** 2 + (1 - t) ** 2  # [..., J, 1]
    away = x[..., None, :] - t * mu  # [..., J, D]
    log_r = w.log()[:, None] - 0.5 * x.shape[-1] * var.log() - 0.5 * (away**2).sum(-1, keepdim=True) / var
    r = torch.softmax(log_r, dim=-2)
    return (r * (mu + (t * s[:, None] ** 2 - (1 - t)) / var * away)).sum(-2)


def gaussian_loss(t: Tensor, s: Tensor | float) -> Tensor:
    """The smallest loss of a dimension, Var(x_1 - x_0 | x_t) = s^2 / (t^2 s^2 + (1 - t)^2).

    For x_0 ~ N(0, 1) and x_1 ~ N(m, s^2). Its integral over t in [0, 1] is s pi / 2.
    """
    return s**2 / (t**2 * s**2 + (1 - t) ** 2)


def over_unit_interval(n: int) -> tuple[Tensor, Tensor]:
    """Points in (0, 1) and weights of Gauss-Legendre quadrature, float64 [n] each."""
    points, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
