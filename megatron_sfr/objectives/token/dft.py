"""DFT (Dynamic Fine-Tuning, arXiv 2508.05629): cross-entropy weighted by the label's own probability.

L = -sg(p_y) ln p_y,  dL/dz = p_y (softmax(z) - e_y), with sg = stop gradient. Improbable labels have little effect.
"""

from dataclasses import dataclass

from megatron_sfr.kernels.vocab_parallel import Rows, Scan
from megatron_sfr.objectives.token.token_loss import Closed


@dataclass(frozen=True)
class DFT:
    """Cross-entropy times the label's current probability."""

    @property
    def scan(self) -> Scan:
        """Only the sum at temperature 1."""
        return Scan()

    def close(self, rows: Rows) -> Closed:
        """Loss p_y (ln u - x_y); gradient p_y (exp(x) / u - e_y)."""
        p_y = rows.x_y.exp() / rows.u
        return Closed(p_y * (rows.u.log() - rows.x_y), p_y / rows.u, p_y)
