"""TOFU, Tempered Focal loss (arXiv 2605.00195): cross-entropy at a temperature, weighted towards improbable labels.

L = -sg(g(p_y)) beta ln q_y,  q = softmax(z / beta),  g(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) ln p, with
sg = stop gradient; dL/dz = g (q - e_y). g is the factor by which the focal loss -(1 - p)^gamma ln p multiplies the
gradient of cross-entropy.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register(
    "tofu",
    examples={"tofu": {"beta": 0.7, "gamma": 2.0}, "tofu-half": {"beta": 1.0, "gamma": 0.5}},
)
@dataclass(frozen=True)
class TOFU(ClosedFormLoss):
    """TOFU (arXiv 2605.00195), for --objective tofu.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> loss, cross_entropy = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), sfr.TOFU(beta=1.0, gamma=1.0))
        >>> round((loss / cross_entropy).item(), 4)  # g(1/4) = 3/4 + ln(4) / 4
        1.0966
    """

    beta: float
    """Temperature beta of the softmax q, in (0, 1]. 1 is the softmax of the logits. Required with --objective tofu."""
    gamma: float
    """Exponent gamma of the focal weight, at least 0. 0 gives all labels the same weight; the larger gamma, the smaller
    is the weight of probable labels. Required with --objective tofu."""

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"`beta` = {self.beta}: choose above 0 and up to 1")
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"`gamma` = {self.gamma}: choose 0 or more")

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-sg(g(p_y)) beta ln q_y."""
        weight_T = self.focal_weight(F.cross_entropy(z_TV, y_T, reduction="none").detach())
        return weight_T * self.beta * F.cross_entropy(z_TV / self.beta, y_T, reduction="none")

    def focal_weight(self, cross_entropy_T: Tensor) -> Tensor:
        """g(p_y), with p_y given as -ln p_y: [T], at least 0."""
        rest_T = -torch.expm1(-cross_entropy_T)  # 1 - p
        power_T = rest_T.clamp(min=torch.finfo(rest_T.dtype).tiny) ** (self.gamma - 1)
        return power_T * (rest_T + self.gamma * (-cross_entropy_T).exp() * cross_entropy_T)

    @property
    def statistics(self) -> StatisticsSpec:
        """The sums at temperatures 1 and beta."""
        return StatisticsSpec(beta=self.beta, moments=True)

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss g (beta ln s - x_y); gradient g (exp(x / beta) / s - e_y)."""
        weight = self.focal_weight((stats.u.log() - stats.x_y).clamp(min=0))
        return LossAndCoefficients(weight * (self.beta * stats.s.log() - stats.x_y), weight / stats.s, weight)
