"""SED-SFT (arXiv 2602.07464): cross-entropy, attenuated where the model spreads its mass over many continuations.

L = -ln p_y + lambda M (p_y - 1/2)^2,  M = 1 if the k largest probabilities sum to less than tau, else 0;
dL/dz = (1 - 2 lambda M p_y (p_y - 1/2)) (softmax(z) - e_y). The paper's "entropy" is that square, not Shannon's.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients
from megatron_sfr.objectives.token.registry import register


def check_top_k(top_k: int, name: str) -> None:
    """ValueError if P_k cannot sum this number of probabilities."""
    if not 1 <= top_k <= 128:
        raise ValueError(f"{name} = {top_k}: choose 1 to 128, such as 10")


def top_mass(stats: LogitStatistics) -> Tensor:
    """P_k, the sum of the k largest probabilities: [T], in (0, 1]."""
    return (stats.top.exp().sum(-1) / stats.u).clamp(max=1.0)


@register(
    "sed",
    examples={
        "sed": {"threshold": 0.6123, "weight": 1.5, "top_k": 3},
        "sed-10": {"threshold": 0.5},
        "sed-128": {"threshold": 0.9, "top_k": 128},
    },
)
@dataclass(frozen=True)
class SED(ClosedFormLoss):
    """SED-SFT (arXiv 2602.07464), for --objective sed.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> loss, cross_entropy = sfr.token_loss(torch.zeros(1, 4), torch.tensor([2]), sfr.SED(threshold=0.9, top_k=2))
        >>> round((loss - cross_entropy).item(), 4)  # (1/4 - 1/2)^2: the two largest probabilities sum to 1/2
        0.0625
    """

    threshold: float = field(metadata={"hint": "`megatron-sfr calibrate-sed` finds it for your model and data"})
    """Threshold tau: the squared term applies to tokens whose P_k is below it. 0 exempts every token (cross-entropy), a
    value above 1 none. `megatron-sfr calibrate-sed` computes it for a given share of exempt tokens. Required with
    --objective sed."""
    weight: float = 1.0
    """Weight lambda of the squared term. Default 1. 0 is cross-entropy. Above 1 the term can push a probable label
    down: its probability converges to (1 + sqrt(1 + 8 / lambda)) / 4."""
    top_k: int = 10
    """Number k of the largest probabilities that P_k sums; use the same k as in `megatron-sfr calibrate-sed`. Default
    10, with which the authors' script calibrates the threshold. Their loss uses 2, because the script does not pass k
    on."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"`weight` = {self.weight}: must not be negative")
        check_top_k(self.top_k, "`top_k`")

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        """-ln p_y + lambda M (p_y - 1/2)^2."""
        cross_entropy_T = F.cross_entropy(z_TV, y_T, reduction="none")
        p_k_T = z_TV.softmax(-1).topk(min(self.top_k, z_TV.shape[-1])).values.sum(-1)
        mask_T = (p_k_T < self.threshold).to(z_TV.dtype).detach()
        return cross_entropy_T + self.weight * mask_T * ((-cross_entropy_T).exp() - 0.5).square()

    def logged(self, loss: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        """The squared term with its weight, and the share of tokens that are exempt from it.

        An exempt token's loss is its cross-entropy, to the last bit. A token that is not exempt is counted as exempt
        only where the squared term is below the rounding of cross-entropy: p_y within about 2e-4 of 1/2, in fp32.
        """
        return {"sed squared term": loss - cross_entropy, "sed exempt": (loss == cross_entropy).to(loss.dtype)}

    @property
    def statistics(self) -> StatisticsSpec:
        """The sum at temperature 1 and the k largest logits."""
        return StatisticsSpec(top_k=self.top_k)

    def finalize(self, stats: LogitStatistics) -> LossAndCoefficients:
        """Cross-entropy plus the squared term; the gradient of cross-entropy times a gain."""
        weight = self.weight * (top_mass(stats) < self.threshold).to(stats.u.dtype)
        p_y = stats.x_y.exp() / stats.u
        gain = 1 - 2 * weight * p_y * (p_y - 0.5)
        loss = stats.u.log() - stats.x_y + weight * (p_y - 0.5).square()
        return LossAndCoefficients(loss, gain / stats.u, gain)
