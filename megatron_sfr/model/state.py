"""fp32 buffers of the flow head: gradient measurements, gate, target statistics. Checkpointed with the model.

Shapes: D embedding dimension, N bins of t.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class StepStart(NamedTuple):
    """A training step's number and the head's state before its first microbatch.

    Every microbatch of the step uses these values: the state itself changes after the step's last forward pass.
    """

    step: int
    """Number of the step, from 0."""
    ratio: Tensor
    signal: Tensor
    weight: Tensor
    gate: Tensor


class FlowState(nn.Module):
    """Gradient measurements, gate and target statistics. Equal on all ranks at every step."""

    ratio: Tensor
    """Norm of SFR's gradient at h at weight 1 over the token objective's; 0 before the first measurement: [1]."""
    signal: Tensor
    """Noise-free share of SFR's squared gradient norm: the part that does not average out over noise draws: [1]."""
    weight: Tensor
    """The adaptive weight, for sfr_weight_control = ratio: [1]."""
    gate: Tensor
    """1 if SFR's gradient reaches the backbone, 0 if the gate is closed: [1]."""
    baseline: Tensor
    """EMA of the loss in each bin of t; 0 before the first value: [N]."""
    target_mean: Tensor
    """Mean of the targets, for sfr_target_scale = whiten: [D]."""
    target_std: Tensor
    """Standard deviation of the targets: [D]."""
    batches: Tensor
    """Number of batches in the target statistics, for sfr_whiten = ema: [1]."""

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

    def at(self, step: int) -> StepStart:
        """Copies of the values that a step needs."""
        return StepStart(step, *(x.clone() for x in (self.ratio, self.signal, self.weight, self.gate)))
