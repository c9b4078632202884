"""Semantic Flow Regularization (arXiv 2605.27971): a stochastic head must model embeddings of the text to come.

Letters: B samples, A anchors a sample, K noise draws, D dimension of the sentence embedding, H of the hidden state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.flow.path import interpolate
from megatron_sfr.runtime import noise

SOURCE_STREAM, TIME_STREAM = 0, 1
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SFROptions:
    """The flow-matching loss."""

    sfr_target_scale: Literal["l2", "sqrt_d"] = "sqrt_d"
    """'l2': unit-length targets as the authors' code has them; 'sqrt_d': times sqrt(D), so that noise and target have
    the same scale in each dimension."""
    sfr_time_per: Literal["anchor", "sequence"] = "anchor"
    """Whether each anchor draws its own t, or all anchors of a sequence share one (as the authors' code does)."""
    sfr_draws: int = 4
    """Noise draws (x_0, t) an anchor and step; their losses are averaged."""
    sfr_noise_seed: int = 1234
    """Key of the noise, which is a function of (key, sample, anchor, draw) alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.sfr_draws <= 1024:
            raise ValueError(f"sfr_draws = {self.sfr_draws}: choose 1 to 1024")


def scale_targets(x_1: Tensor, options: SFROptions) -> Tensor:
    """Unit-length embeddings [..., D] to the scale that the flow is trained at; fp32."""
    return x_1.float() * (x_1.shape[-1] ** 0.5 if options.sfr_target_scale == "sqrt_d" else 1.0)


def anchor_weights(ordinal: np.ndarray, length: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Weights of one sample's anchors: proportional to (N - j) / N, scaled to sum to N over each response.

    The paper's position weight w_t = (N - pos_t + 1) / N with pos = j + 1. Summing to the response's number of
    supervised tokens N makes "sum of terms over the global batch / its supervised tokens" SFR's mean too, on any
    layout. A response without anchors weighs nothing.

    Args: int arrays [A]: j (0-based place of the predicted token in its response), N, which response of the sample.
    Returns: float32 [A].
    """
    raw = (length - ordinal) / np.maximum(length, 1)
    total = np.zeros(int(response.max(initial=-1)) + 1)
    np.add.at(total, response, raw)
    return (raw * length / total[response]).astype(np.float32)


def draw_noise(
    sample_B: Tensor, position_BA: Tensor, dim: int, first_draw: int, options: SFROptions
) -> tuple[Tensor, Tensor]:
    """Source points x_0 ~ N(0, I) [B, A, K, D] and times t ~ U(0, 1) [B, A, K, 1], stateless: same keys, same numbers.

    Args: sample_B: global sample indices; position_BA: token positions of the anchors, both int64.
        first_draw: number of the first of the K draws, so that a second, independent set can be had.
    """
    draw_K = torch.arange(first_draw, first_draw + options.sfr_draws, device=sample_B.device)
    sample, position = sample_B[:, None, None], position_BA[:, :, None]
    seed = options.sfr_noise_seed
    x_0 = noise.normal(seed, sample, position, draw_K, dim, stream=SOURCE_STREAM)
    place = position if options.sfr_time_per == "anchor" else torch.zeros_like(position)
    t = noise.uniform(seed, sample, place, draw_K, stream=TIME_STREAM)
    return x_0, t[..., None]


def flow_matching_loss(
    velocity: Velocity, h_BAH: Tensor, x_1_BAD: Tensor, weight_BA: Tensor, x_0_BAKD: Tensor, t_BAK1: Tensor
) -> Tensor:
    """sum_a w_a mean_k mean_d (v(x_t, t, h_a) - (x_1 - x_0))^2, a scalar, in the dtype of the noise (fp32).

    A head that answers 0 costs E|x_1 - x_0|^2 / D an anchor: 1 + 1/D for unit-length targets, 2 for sqrt_d. The optimum
    is v* = E[x_1 - x_0 | x_t, h]: stochastic x_0 makes the head model the distribution of futures, not their mean.

    Args: velocity: (x_t [B, A, K, D], t [B, A, K, 1], h [B, A, 1, H]) -> [B, A, K, D]. Anchors of weight 0 are padding.
    """
    x_t, v = interpolate(x_0_BAKD, x_1_BAD[:, :, None], t_BAK1)
    error = velocity(x_t, t_BAK1, h_BAH[:, :, None]).to(v.dtype) - v
    return (weight_BA * error.square().mean(dim=(-2, -1))).sum()
