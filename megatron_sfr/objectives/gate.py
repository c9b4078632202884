"""The gradient gate of SFR's public code: where the head has solved its task, the backbone is left alone for a step.

Letters: N bins of t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateOptions:
    """When the term's gradient stops short of the backbone."""

    sfr_gate: Literal["none", "static", "dynamic"] = "none"
    """'static' closes after a step whose loss was below sfr_gate_threshold; 'dynamic' after one whose loss was below
    its running baseline over sfr_gate_ratio (on in the authors' YAML). While closed, only the head learns."""
    sfr_gate_threshold: float = 0.1
    """Loss below which the static gate closes."""
    sfr_gate_ratio: float = 1.5
    """How many times below its baseline the loss must be for the dynamic gate to close; the authors' 1.5."""
    sfr_gate_decay: float = 0.99
    """Share of the baseline that a step keeps; the authors' 0.99."""
    sfr_gate_bins: int = 8
    """Bins of t with a baseline each. The loss depends on t far more than on progress, so with the authors' single bin
    the gate mostly follows the times that were drawn."""

    def __post_init__(self) -> None:
        if self.sfr_gate_ratio < 1:
            raise ValueError(f"sfr_gate_ratio = {self.sfr_gate_ratio}: below 1 the gate would close on every step")
        if not 0 <= self.sfr_gate_decay < 1:
            raise ValueError(f"sfr_gate_decay = {self.sfr_gate_decay}: choose 0 up to, but not, 1")
        if not 1 <= self.sfr_gate_bins <= 1024:
            raise ValueError(f"sfr_gate_bins = {self.sfr_gate_bins}: choose 1 to 1024")


def sums_by_time(error: Tensor, weight: Tensor, t: Tensor, bins: int) -> Tensor:
    """[sum w error, sum w] in each bin of t in [0, 1], for tensors that broadcast: [2, N], without a gradient."""
    error, weight, t = (x.detach().reshape(-1) for x in torch.broadcast_tensors(error, weight, t))
    index = (t * bins).long().clamp(0, bins - 1)
    sums_2N = torch.zeros(2, bins, dtype=error.dtype, device=error.device)
    return sums_2N.index_add_(1, index, torch.stack([weight * error, weight]))


def decide(sums_2N: Tensor, baseline_N: Tensor, options: GateOptions) -> tuple[Tensor, Tensor]:
    """Whether the gate is open for the next step (1.0 or 0.0, [1]), and the baseline [N] with this step in it.

    A bin without a baseline yet (0) is left out of the comparison; with none, the gate is open.
    """
    total_N, weight_N = sums_2N
    found_N = total_N / weight_N.clamp(min=1e-20)
    known_N = (baseline_N > 0) & (weight_N > 0)
    if options.sfr_gate == "static":
        closed = (total_N.sum() < options.sfr_gate_threshold * weight_N.sum()) & (weight_N.sum() > 0)
    else:
        expected = torch.where(known_N, weight_N * baseline_N, 0).sum()
        closed = torch.where(known_N, total_N, 0).sum() * options.sfr_gate_ratio < expected
    keep = options.sfr_gate_decay
    baseline = torch.where(baseline_N > 0, keep * baseline_N + (1 - keep) * found_N, found_N)
    return (~closed).to(baseline_N.dtype)[None], torch.where(weight_N > 0, baseline, baseline_N)
