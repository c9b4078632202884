"""Fixed-step solvers of the ODE dx/dt = v(x, t) from noise at t = 0 to data at t = 1."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [..., D], t [..., 1]) -> [..., D]
Method = Literal["euler", "heun"]


def integrate(velocity: Velocity, x_0: Tensor, steps: int, method: Method = "heun") -> Tensor:
    """x_1 for each x_0 [..., D], in its dtype.

    Euler: x + v(x, t) / n, with an error of order 1/n. Heun: x + (v(x, t) + v(x', t + 1/n)) / 2n, where x' is Euler's
    step, with an error of order 1/n^2 at two calls per step. For x_0 ~ N(0, I) and v* = E[x_1 - x_0 | x_t], x_1 has the
    distribution of the data (Lipman et al. 2023, arXiv 2210.02747). Raises ValueError if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    x, dt = x_0, 1 / steps
    for i in range(steps):
        v = velocity(x, _time(x, i / steps))
        if method == "heun":
            v = (v + velocity(x + dt * v, _time(x, (i + 1) / steps))) / 2
        x = x + dt * v
    return x


def _time(x: Tensor, t: float) -> Tensor:
    return torch.full_like(x[..., :1], t)
