"""How much SFR weighs at each step: phase A (head alone), B (ramp), C (constant or decay). SFR, arXiv 2605.27971."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleOptions:
    """When and how strongly the flow-matching loss reaches the backbone."""

    sfr_weight: float = 1.0
    """Weight lambda of SFR. 0 trains exactly as plain cross-entropy does."""
    sfr_weight_on: Literal["hidden", "loss"] = "hidden"
    """Where the weight acts. 'hidden': on SFR's gradient at the hidden states, so that it concerns the backbone alone;
    the head learns from its own loss at weight 1 and is clipped apart (sfr_clip_grad). 'loss': on the whole loss, with
    one gradient norm for head and backbone, as the authors' code has it; a large weight then shrinks the backbone's
    step."""
    sfr_warmup: Literal["head_only", "detached"] = "head_only"
    """Phase A: 'head_only' trains the head and gives the backbone a gradient of exactly zero (weight decay, if any,
    still applies to it); 'detached' trains the backbone by cross-entropy while the head learns on detached states."""
    sfr_warmup_steps: int = 0
    """Length of phase A in steps."""
    sfr_ramp_steps: int = 0
    """Length of phase B in steps: the weight rises linearly from 0 while the gradient reaches the backbone."""
    sfr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Phase C: the weight's course over the remaining steps."""
    sfr_weight_control: Literal["fixed", "ratio"] = "fixed"
    """'ratio' steers the weight so that the gradient norm of SFR at h stays at sfr_grad_ratio of cross-entropy's. It
    starts from a measurement at the last step of phase A and stays within a factor of 10,000 of sfr_weight."""
    sfr_grad_ratio: float = 0.1
    """Target ratio of gradient norms at h, for sfr_weight_control = ratio."""
    sfr_measure_interval: int = 50
    """Steps between two measurements of the gradient ratio and its signal share; 0 never measures. The last step of
    phase A is measured as well."""

    def __post_init__(self) -> None:
        for name in ("sfr_weight", "sfr_warmup_steps", "sfr_ramp_steps", "sfr_measure_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.sfr_weight_control == "ratio" and self.sfr_grad_ratio <= 0:
            raise ValueError(f"sfr_grad_ratio = {self.sfr_grad_ratio}: a steered weight needs a ratio above 0")
        if self.sfr_weight_control == "ratio" and self.sfr_measure_interval == 0:
            raise ValueError("sfr_weight_control = ratio needs measurements: set sfr_measure_interval above 0")
        if self.sfr_weight_control == "ratio" and self.sfr_weight == 0:
            raise ValueError("sfr_weight_control = ratio steers the weight around sfr_weight: set it above 0")


@dataclass(frozen=True)
class Phase:
    """What one step does with the two losses."""

    cross_entropy: float
    """Weight of cross-entropy: 0 or 1."""
    share: float
    """Share of the full SFR weight that applies at this step, in [0, 1]."""
    detach: bool
    """Whether the head reads detached hidden states, so that only the head learns."""


def phase_at(step: int, total_steps: int, options: ScheduleOptions) -> Phase:
    """The phase of a 0-based step of a run of total_steps.

    A: step < warmup. B: share = (step - warmup) / ramp. C: share 1, 1 - u or (1 + cos(pi u)) / 2 with u the progress
    through the steps that remain after B.
    """
    after_warmup = step - options.sfr_warmup_steps
    if after_warmup < 0:
        return Phase(cross_entropy=float(options.sfr_warmup == "detached"), share=1.0, detach=True)
    share = 1.0
    if after_warmup < options.sfr_ramp_steps:
        share = after_warmup / options.sfr_ramp_steps
    elif options.sfr_decay != "constant":
        remaining = total_steps - options.sfr_warmup_steps - options.sfr_ramp_steps
        u = min(1.0, (after_warmup - options.sfr_ramp_steps) / max(1, remaining))
        share = 1 - u if options.sfr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * u))
    # At weight 0 the state is detached too: 0 * inf would be NaN, and an absent gradient is exactly zero.
    return Phase(cross_entropy=1.0, share=share, detach=share == 0 or options.sfr_weight == 0)
