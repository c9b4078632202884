"""What the term has learnt about itself, as fp32 buffers of the head: saved, resharded and resumed with the model.

Letters: D dimension of the embedding, N bins of t.
"""

import torch
from torch import Tensor, nn


class FlowState(nn.Module):
    """The gradient measurements, the gate and the targets' statistics. The same on every rank, at every step."""

    ratio: Tensor
    """Norm of SFR's gradient at h, at weight 1, over the token objective's; 0 before the first measurement: [1]."""
    signal: Tensor
    """Share of SFR's gradient power that does not average out over noise draws: [1]."""
    weight: Tensor
    """The steered weight, for sfr_weight_control = ratio: [1]."""
    gate: Tensor
    """1 where the term's gradient reaches the backbone, 0 where the gate is closed: [1]."""
    baseline: Tensor
    """Running mean of the loss in each bin of t; 0 before the first: [N]."""
    target_mean: Tensor
    """Mean of the targets, for sfr_target_scale = whiten: [D]."""
    target_std: Tensor
    """Their standard deviation: [D]."""
    batches: Tensor
    """Batches in these statistics, for sfr_whiten = ema: [1]."""

    def __init__(self, weight: float, dim: int, bins: int) -> None:
        super().__init__()
        start = {
            "ratio": torch.zeros(1),
            "signal": torch.zeros(1),
            "weight": torch.tensor([weight]),
            "gate": torch.ones(1),
            "baseline": torch.zeros(bins),
            "target_mean": torch.zeros(dim),
            "target_std": torch.full((dim,), dim**-0.5),
            "batches": torch.zeros(1),
        }
        for name, value in start.items():
            self.register_buffer(name, value)
