"""A pytest plugin that registers two new losses, one right and one with a wrong gradient; test_registry.py loads it."""

from dataclasses import dataclass

import hypothesis
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register("poly", examples={"poly": {"epsilon": 2.0}})
@dataclass(frozen=True)
class Poly(ClosedFormLoss):
    """Poly-1 (arXiv 2204.12511): L = -ln p_y + epsilon (1 - p_y),  dL/dz = (1 + epsilon p_y) (p - e_y)."""

    epsilon: float = 1.0
    """Weight of the linear term. Default 1."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        cross_entropy_T = F.cross_entropy(z_TV, y_T, reduction="none")
        return cross_entropy_T + self.epsilon * (1 - (-cross_entropy_T).exp())

    @property
    def statistics(self) -> StatisticsSpec:
        return StatisticsSpec()

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        p_y = stats.x_y.exp() / stats.u
        gain = 1 + self.epsilon * p_y
        return LossAndCoefficients(stats.u.log() - stats.x_y + self.epsilon * (1 - p_y), gain / stats.u, gain)


@register("wrong")
@dataclass(frozen=True)
class WrongPoly(Poly):
    """Poly-1 without the linear term's gradient."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        return super().loss(z_TV, y_T)

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        loss, softmax_coef, label_coef = super().finalize(stats)
        return LossAndCoefficients(loss, softmax_coef / label_coef, label_coef / label_coef)


def pytest_collection_modifyitems() -> None:
    """Looks for a failure without reducing it to the smallest one."""
    phases = (hypothesis.Phase.generate,)
    hypothesis.settings.register_profile("first", deadline=None, max_examples=20, phases=phases, database=None)
    hypothesis.settings.load_profile("first")
