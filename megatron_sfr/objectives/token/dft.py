"""DFT (Dynamic Fine-Tuning, arXiv 2508.05629): cross-entropy weighted by the label's own probability.

L = -sg(p_y) ln p_y,  dL/dz = p_y (softmax(z) - e_y), with sg = stop gradient. Improbable labels have little effect.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register("dft")
@dataclass(frozen=True)
class DFT(ClosedFormLoss):
    """DFT (arXiv 2508.05629): cross-entropy times the label's current probability.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> loss, cross_entropy = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), sfr.DFT())
        >>> round((loss / cross_entropy).item(), 4)
        0.25
    """

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-sg(p_y) ln p_y."""
        cross_entropy_T = F.cross_entropy(z_TV, y_T, reduction="none")
        return (-cross_entropy_T).exp().detach() * cross_entropy_T

    @property
    def statistics(self) -> StatisticsSpec:
        """Only the sum at temperature 1."""
        return StatisticsSpec()

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss p_y (ln u - x_y); gradient p_y (exp(x) / u - e_y)."""
        p_y = stats.x_y.exp() / stats.u
        return LossAndCoefficients(p_y * (stats.u.log() - stats.x_y), p_y / stats.u, p_y)
