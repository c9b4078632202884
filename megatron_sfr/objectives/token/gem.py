"""GEM, Preserving Diversity in Supervised Fine-Tuning of LLMs (arXiv 2408.16673): push down only close competitors.

With q = sg softmax(z / beta), w_i = 1 (linear) or sg sigmoid(c (z_i - z_y)) (logsigmoid), sg = stop gradient:
L = -sum_i q_i w_i (ln p_y - ln p_i) = sum_i a_i z_i - A z_y,  a_i = q_i w_i,  A = sum_i a_i,  and  dL/dz = a - A e_y.
Linear GEM has exactly the gradient of beta CE(z / beta), so its optimum is p_model proportional to p_data^beta.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_sfr.kernels.vocab_parallel import Rows, Scan
from megatron_sfr.objectives.token.token_loss import Closed


@dataclass(frozen=True)
class GEMOptions:
    """GEM, for --objective gem."""

    gem_beta: float = 0.7
    """Temperature beta of q, the distribution over competing tokens, in (0, 1]. 1 gives the gradient of cross-entropy.
    Towards 0 only the most probable token competes, and a label that is already the most probable token has no
    gradient. Default 0.7, as in the paper."""
    gem_h: Literal["linear", "logsigmoid"] = "linear"
    """The paper's function h of the log-ratio. 'linear' (default) gives all competing tokens weight 1; 'logsigmoid'
    weights them by sigmoid(c (z_i - z_y)), as the authors' scripts do."""
    gem_slope: float = 0.01
    """Slope c of the logsigmoid. Default 0.01, as in the authors' scripts; the loss is then about half the linear
    one."""

    def __post_init__(self) -> None:
        if not 0 < self.gem_beta <= 1:
            raise ValueError(f"gem_beta = {self.gem_beta}: choose above 0 and up to 1 (1 is cross-entropy's gradient)")
        if self.gem_slope <= 0:
            raise ValueError(f"gem_slope = {self.gem_slope}: the logsigmoid needs a slope above 0")


@dataclass(frozen=True)
class GEM:
    """GEM's loss of one token."""

    options: GEMOptions = GEMOptions()

    @property
    def scan(self) -> Scan:
        """Sums at temperature beta, weighted if h is the logsigmoid."""
        c = self.options.gem_slope if self.options.gem_h == "logsigmoid" else 0.0
        return Scan(beta=self.options.gem_beta, moments=True, c=c)

    def close(self, rows: Rows) -> Closed:
        """Loss (sum_i a_i x_i - A x_y) / s; gradient w exp(x / beta) / s - (A / s) e_y."""
        return Closed((rows.a_x - rows.a * rows.x_y) / rows.s, 1 / rows.s, rows.a / rows.s)
