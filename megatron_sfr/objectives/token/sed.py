"""SED-SFT (arXiv 2602.07464): cross-entropy, attenuated where the model spreads its mass over many continuations.

L = -ln p_y + lambda M (p_y - 1/2)^2,  M = 1 if the k largest probabilities sum to less than tau, else 0;
dL/dz = (1 - 2 lambda M p_y (p_y - 1/2)) (softmax(z) - e_y). The paper's "entropy" is that square, not Shannon's.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Rows, Scan
from megatron_sfr.objectives.token.token_loss import Closed


@dataclass(frozen=True)
class SEDOptions:
    """SED-SFT, for --objective sed."""

    sed_weight: float = 1.0
    """Weight lambda of the squared term. Default 1. 0 is cross-entropy. Above 1 the term can push a probable label
    down: its probability converges to (1 + sqrt(1 + 8 / lambda)) / 4."""
    sed_top_k: int = 10
    """Number k of the largest probabilities that P_k sums; use the same k as in `megatron-sfr calibrate-sed`. Default
    10."""
    sed_threshold: float | None = None
    """Threshold tau: the squared term applies to tokens whose P_k is below it. 0 exempts every token (cross-entropy), a
    value above 1 none. `megatron-sfr calibrate-sed` computes it for a given share of exempt tokens. Required with
    --objective sed."""

    def __post_init__(self) -> None:
        if self.sed_weight < 0:
            raise ValueError(f"sed_weight = {self.sed_weight}: must not be negative")
        if not 1 <= self.sed_top_k <= 128:
            raise ValueError(f"sed_top_k = {self.sed_top_k}: choose 1 to 128 (the authors' 10)")


def top_mass(rows: Rows) -> Tensor:
    """P_k, the sum of the k largest probabilities: [T], in (0, 1]."""
    return (rows.top.exp().sum(-1) / rows.u).clamp(max=1.0)


@dataclass(frozen=True)
class SED:
    """SED-SFT's loss of one token."""

    options: SEDOptions

    @property
    def scan(self) -> Scan:
        """The sum at temperature 1 and the k largest logits."""
        return Scan(top_k=self.options.sed_top_k)

    def close(self, rows: Rows) -> Closed:
        """Cross-entropy plus the squared term; the gradient of cross-entropy times a gain."""
        assert self.options.sed_threshold is not None
        weight = self.options.sed_weight * (top_mass(rows) < self.options.sed_threshold).to(rows.u.dtype)
        p_y = rows.x_y.exp() / rows.u
        gain = 1 - 2 * weight * p_y * (p_y - 0.5)
        return Closed(rows.u.log() - rows.x_y + weight * (p_y - 0.5).square(), gain / rows.u, gain)
