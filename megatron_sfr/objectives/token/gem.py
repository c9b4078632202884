"""GEM, Preserving Diversity in Supervised Fine-Tuning of LLMs (arXiv 2408.16673): push down only close competitors.

With q = sg softmax(z / beta), w_i = 1 (linear) or sg sigmoid(c (z_i - z_y)) (logsigmoid), sg = stop gradient:
L = -sum_i q_i w_i (ln p_y - ln p_i) = sum_i a_i z_i - A z_y,  a_i = q_i w_i,  A = sum_i a_i,  and  dL/dz = a - A e_y.
Linear GEM has exactly the gradient of beta CE(z / beta), so its optimum is p_model proportional to p_data^beta.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register("gem", examples={"gem": {}, "gem-logsigmoid": {"h": "logsigmoid", "beta": 0.6, "slope": 0.4}})
@dataclass(frozen=True)
class GEM(ClosedFormLoss):
    """GEM (arXiv 2408.16673), for --objective gem.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> loss, _ = sfr.token_loss(logits, torch.tensor([1]), sfr.GEM(beta=0.7))
        >>> loss.sum().backward()
        >>> torch.allclose(logits.grad, (logits / 0.7).softmax(-1) - torch.tensor([0.0, 1.0, 0.0]))
        True
    """

    beta: float = 0.7
    """Temperature beta of q, the distribution over competing tokens, in (0, 1]. 1 gives the gradient of cross-entropy.
    Towards 0 only the most probable token competes, and a label that is already the most probable token has no
    gradient. Default 0.7, as in the paper."""
    h: Literal["linear", "logsigmoid"] = "linear"
    """The paper's function h of the log-ratio. 'linear' (default) gives all competing tokens weight 1; 'logsigmoid'
    weights them by sigmoid(c (z_i - z_y)), as the authors' scripts do."""
    slope: float = 0.01
    """Slope c of the logsigmoid. Default 0.01, as in the authors' scripts; the loss is then about half the linear
    one."""

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"`beta` = {self.beta}: choose above 0 and up to 1 (1 is cross-entropy's gradient)")
        if self.slope <= 0:
            raise ValueError(f"`slope` = {self.slope}: the logsigmoid needs a slope above 0")

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-sum_i q_i w_i (ln p_y - ln p_i)."""
        log_p_TV = z_TV.log_softmax(-1)
        q_TV = (z_TV / self.beta).softmax(-1).detach()
        w_TV = torch.ones_like(z_TV)
        if self.h == "logsigmoid":
            w_TV = (self.slope * (z_TV - z_TV.gather(1, y_T[:, None]))).sigmoid().detach()
        return -(q_TV * w_TV * (log_p_TV.gather(1, y_T[:, None]) - log_p_TV)).sum(-1)

    @property
    def statistics(self) -> StatisticsSpec:
        """Sums at temperature beta, weighted if h is the logsigmoid."""
        return StatisticsSpec(beta=self.beta, moments=True, c=self.slope if self.h == "logsigmoid" else 0.0)

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss (sum_i a_i x_i - A x_y) / s; gradient w exp(x / beta) / s - (A / s) e_y."""
        return LossAndCoefficients((stats.a_x - stats.a * stats.x_y) / stats.s, 1 / stats.s, stats.a / stats.s)
