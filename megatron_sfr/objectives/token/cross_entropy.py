"""Cross-entropy: L = ln sum_i exp(z_i) - z_y,  dL/dz = softmax(z) - e_y."""

from dataclasses import dataclass

import torch

from megatron_sfr.kernels.vocab_parallel import Rows, Scan
from megatron_sfr.objectives.token.token_loss import Closed


@dataclass(frozen=True)
class CrossEntropy:
    """Plain maximum likelihood."""

    @property
    def scan(self) -> Scan:
        """Only the sum at temperature 1."""
        return Scan()

    def close(self, rows: Rows) -> Closed:
        """Loss ln u - x_y; gradient exp(x) / u - e_y."""
        return Closed(rows.u.log() - rows.x_y, 1 / rows.u, torch.ones_like(rows.u))
