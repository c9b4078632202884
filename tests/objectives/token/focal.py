"""A user's own loss, written in plain torch and selected by its dotted path: focal loss (arXiv 1708.02002)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import register


@register("focal", examples={"focal": {"gamma": 1.5}})
@dataclass(frozen=True)
class Focal(TokenLoss):
    """-(1 - p_y)^gamma ln p_y. Its gradient is not a weighted softmax minus a one-hot vector in any fixed weights."""

    gamma: float = 2.0
    """Exponent of 1 - p_y, at least 1. Default 2."""

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise ValueError(f"`gamma` = {self.gamma}: give at least 1")

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        log_p_T = z_TV.log_softmax(-1).gather(1, y_T[:, None])[:, 0]
        return -((1 - log_p_T.exp()) ** self.gamma) * log_p_T


class NotRegistered(Focal):
    """A loss without a name."""
