"""The gradient gate of SFR's public code: it keeps SFR's gradient from the backbone while the head's loss is low.

Shapes: N bins of t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sfr.option_names import named


@named("sfr_gate_", kind="sfr_gate")
@dataclass(frozen=True)
class GateOptions:
    """When the gate keeps the auxiliary loss's gradient from the backbone.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.GateOptions(kind="static", threshold=0.2).bins
        8
    """

    kind: Literal["none", "static", "dynamic"] = "none"
    """Whether a low SFR loss closes the gate for the next step, so that only the head learns. 'none' (default): never.
    'static': when the loss is below sfr_gate_threshold. 'dynamic': when the loss is below its running baseline divided
    by sfr_gate_ratio (on in the authors' YAML)."""
    threshold: float = 0.1
    """Loss below which the static gate closes. Default 0.1."""
    ratio: float = 1.5
    """The dynamic gate closes when the loss is below the baseline divided by this ratio. Default 1.5, as in the
    authors' code."""
    decay: float = 0.99
    """EMA decay of the baseline per step. Default 0.99, as in the authors' code."""
    baseline: Literal["previous", "current"] = "previous"
    """What the dynamic gate compares a step's loss with. 'previous' (default): the baseline of the earlier steps.
    'current': the baseline that already includes this step's loss, as in the authors' code."""
    bins: int = 8
    """Number of bins of t, each with its own baseline. The loss depends far more on t than on training progress: with
    the authors' single bin the gate mostly reacts to which t were drawn. Default 8."""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"`ratio` = {self.ratio}: below 1 the gate would close on every step")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` = {self.decay}: choose at least 0 and below 1")
        if not 1 <= self.bins <= 1024:
            raise ValueError(f"`bins` = {self.bins}: choose 1 to 1024")


def sums_by_time(error: Tensor, weight: Tensor, t: Tensor, bins: int) -> Tensor:
    """[sum w error, sum w] in each bin of t in [0, 1]: [2, N], detached. The tensors are broadcast first."""
    error, weight, t = (x.detach().reshape(-1) for x in torch.broadcast_tensors(error, weight, t))
    bin_N1 = torch.arange(bins, device=t.device)[:, None]
    inside_NX = (t * bins).long().clamp(0, bins - 1) == bin_N1
    # Not by index_add, which adds in another order in each run on CUDA: the gate would not be reproducible.
    return torch.stack([torch.where(inside_NX, x, 0).sum(-1) for x in (weight * error, weight)])


def decide(sums_2N: Tensor, baseline_N: Tensor, options: GateOptions) -> tuple[Tensor, Tensor]:
    """Whether the gate is open for the next step (1.0 or 0.0, [1]), and the updated baseline [N].

    Bins that have no baseline yet (0) are not compared; if no bin has one, the gate is open.
    """
    total_N, weight_N = sums_2N
    mean_N = total_N / weight_N.clamp(min=1e-20)
    known_N = (baseline_N > 0) & (weight_N > 0)
    keep = options.decay
    new_N = torch.where(baseline_N > 0, keep * baseline_N + (1 - keep) * mean_N, mean_N)
    if options.kind == "static":
        closed = (total_N.sum() < options.threshold * weight_N.sum()) & (weight_N.sum() > 0)
    else:
        compared_N = new_N if options.baseline == "current" else baseline_N
        expected = torch.where(known_N, weight_N * compared_N, 0).sum()
        closed = torch.where(known_N, total_N, 0).sum() * options.ratio < expected
    return (~closed).to(baseline_N.dtype)[None], torch.where(weight_N > 0, new_N, baseline_N)
