"""EAFT, Entropy-Adaptive Fine-Tuning (arXiv 2601.02151): cross-entropy weighted by how undecided the model is.

L = -sg(w) ln p_y,  w = (H / ln k)^alpha,  H the entropy of the softmax of the k largest logits, sg = stop gradient;
dL/dz = w (softmax(z) - e_y). Labels that contradict a confident model have little effect.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


@register("eaft", examples={"eaft": {"top_k": 3}, "eaft-20": {"alpha": 2.0}})
@dataclass(frozen=True)
class EAFT(ClosedFormLoss):
    """EAFT (arXiv 2601.02151), for --objective eaft.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> logits = torch.tensor([[0.0, 0.0, -100.0, -100.0]])
        >>> loss, cross_entropy = sfr.token_loss(logits, torch.tensor([0]), sfr.EAFT(top_k=4))
        >>> round((loss / cross_entropy).item(), 4)  # undecided between two of four
        0.5
    """

    alpha: float = 1.0
    """Exponent alpha of the normalized entropy, above 0. Default 1, as in the paper."""
    top_k: int = 20
    """Number k of the largest logits whose softmax gives the entropy, 2 to 128. Default 20, as in the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"`alpha` = {self.alpha}: choose above 0")
        if not 2 <= self.top_k <= 128:
            raise ValueError(f"`top_k` = {self.top_k}: choose 2 to 128 (the paper's 20)")

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-sg(w) ln p_y."""
        top_TK = z_TV.detach().topk(min(self.top_k, z_TV.shape[-1])).values
        return self.weight(top_TK) * F.cross_entropy(z_TV, y_T, reduction="none")

    def weight(self, top_TK: Tensor) -> Tensor:
        """(H / ln k)^alpha of the largest logits, where -inf stands for none: [T], in [0, 1]."""
        log_p_TK = top_TK.log_softmax(-1)
        p_TK = log_p_TK.exp()
        entropy_T = -(p_TK * log_p_TK.masked_fill(p_TK == 0, 0.0)).sum(-1)
        return (entropy_T / math.log(self.top_k)).clamp(0, 1) ** self.alpha

    @property
    def statistics(self) -> StatisticsSpec:
        """The sum at temperature 1 and the k largest logits."""
        return StatisticsSpec(top_k=self.top_k)

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Loss w (ln u - x_y); gradient w (exp(x) / u - e_y)."""
        weight = self.weight(stats.top)
        return LossAndCoefficients(weight * (stats.u.log() - stats.x_y), weight / stats.u, weight)
