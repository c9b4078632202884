"""Cross-entropy: L = ln sum_i exp(z_i) - z_y,  dL/dz = softmax(z) - e_y."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register("ce")
@dataclass(frozen=True)
class CrossEntropy(ClosedFormLoss):
    """Cross-entropy: maximum likelihood.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> loss, _ = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), sfr.CrossEntropy())
        >>> round(loss.item(), 4)  # ln 4
        1.3863
    """

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-ln p_y."""
        return F.cross_entropy(z_TV, y_T, reduction="none")

    @property
    def statistics(self) -> StatisticsSpec:
        """Only the sum at temperature 1."""
        return StatisticsSpec()

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss ln u - x_y; gradient exp(x) / u - e_y."""
        return LossAndCoefficients(stats.u.log() - stats.x_y, 1 / stats.u, torch.ones_like(stats.u))
