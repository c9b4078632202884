"""From noise to data along a velocity: the ODE dx/dt = v(x, t) from t = 0 to 1, in equal steps."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [..., D], t [..., 1]) -> [..., D]
Method = Literal["euler", "heun"]


def integrate(velocity: Velocity, x_0: Tensor, steps: int, method: Method = "heun") -> Tensor:
    """x_1 for each x_0 [..., D], in its dtype.

    Euler: x + v(x, t) / n, an error of order 1/n. Heun: x + (v(x, t) + v(x', t + 1/n)) / 2n with x' Euler's step, of
    order 1/n^2 at two calls a step. For x_0 ~ N(0, I) and v* = E[x_1 - x_0 | x_t] the law of x_1 is the data's (Lipman
    et al. 2023, arXiv 2210.02747). ValueError unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps lead nowhere; give at least 1")
    x, dt = x_0, 1 / steps
    for i in range(steps):
        v = velocity(x, _time(x, i / steps))
        if method == "heun":
            v = (v + velocity(x + dt * v, _time(x, (i + 1) / steps))) / 2
        x = x + dt * v
    return x


def _time(x: Tensor, t: float) -> Tensor:
    return torch.full_like(x[..., :1], t)
