"""The e-geodesic of the simplex, the straight line between log-probabilities, from Dirichlet noise to a token.

KL-flow's path (Logit-KL Flow Matching, arXiv 2411.16821). V: vocabulary size; b: smoothing; t: time in [0, 1); l: a
point in log-probabilities, up to a constant per position; x = softmax(l): the point itself. The last axis may be a
shard of the vocabulary: no function here reduces over it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sfr.runtime.noise import uniforms


@dataclass(frozen=True)
class Simplex:
    """The simplex over V tokens. Their one-hot vectors are smoothed by b, so that the logarithms are finite."""

    size: int
    """V, the number of tokens of the whole vocabulary, without padding."""
    b: float = 0.01
    """Probability mass of a smoothed one-hot that is spread evenly over all tokens."""

    def __post_init__(self) -> None:
        if self.size < 2 or not 0 < self.b < 1:
            raise ValueError(f"size is {self.size} and b is {self.b}; give at least 2 tokens and 0 < b < 1")

    @property
    def low(self) -> float:
        """l1_j of every other token: ln(b / V)."""
        return math.log(self.b / self.size)

    @property
    def gap(self) -> float:
        """l1_i - l1_j, the token's own value minus any other: ln(V / b - V + 1); 15.42 at V = 50257, b = 0.01."""
        return math.log(self.size / self.b - self.size + 1)

    def between(self, l_0: Tensor, column: Tensor, t: Tensor) -> Tensor:
        """l_t = (1 - t) l0 + t l1 up to the constant t low: [..., V]. Overwrites l_0.

        Args:
            l_0: log-probabilities of the noise, [..., V], overwritten.
            column: int64 [...], the token's column in this shard; -1 if another rank holds it.
            t: time, broadcast to [...].
        """
        l_0.mul_((1 - t)[..., None])
        rise = torch.where(column >= 0, t * self.gap, 0).to(l_0.dtype)
        return l_0.scatter_add_(-1, column.clamp(min=0)[..., None], rise.expand(column.shape)[..., None])

    def expected(self, p: Tensor) -> Tensor:
        """E[l1] = p ln(1 - b + b/V) + (1 - p) ln(b/V) for the denoiser's probabilities p [..., V]."""
        return self.low + self.gap * p

    def velocity(self, l: Tensor, p: Tensor, t: Tensor) -> Tensor:
        """dl/dt = (E[l1 | x_t] - l) / (1 - t): [..., V]. t broadcasts against l, which must include its constant."""
        return (self.expected(p) - l) / (1 - t)

    def euler(self, l: Tensor, p: Tensor, h: float | Tensor) -> Tensor:
        """One step of dl/dt' = E[l1] - l in the time t' = -ln(1 - t): (1 - h) l + h E[l1], up to a constant."""
        return (1 - h) * l + (h * self.gap) * p


def log_dirichlet(
    seed: int, sample: Tensor, position: Tensor, draw: Tensor, width: int, *, start: int = 0, stream: int
) -> Tensor:
    """l0 = ln x0 with x0 ~ Dirichlet(1), up to a constant: logarithms of independent Exp(1) numbers, float32.

    Takes the arguments of `uniforms`: one vector per (sample, position, draw), with `width` columns from `start` (a
    multiple of 4).
    """
    return uniforms(seed, sample, position, draw, width, start=start, stream=stream).log_().neg_().log_()
