"""SFR's weight at each step: phase A (head only), B (ramp), C (constant or decay). SFR, arXiv 2605.27971."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sfr.option_names import named


@named("sfr_")
@dataclass(frozen=True)
class ScheduleOptions:
    """When and how strongly the flow-matching loss reaches the backbone.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.ScheduleOptions(warmup="detached", warmup_steps=100, ramp_steps=100, weight_control="ratio").grad_ratio
        0.1
    """

    weight: float = 1.0
    """Weight lambda of SFR. Default 1. With 0 the backbone trains exactly as with plain cross-entropy."""
    weight_on: Literal["hidden", "loss"] = "hidden"
    """What the weight multiplies. 'hidden' (default): SFR's gradient at the hidden states, so that it affects only the
    backbone; the head trains on its own loss at weight 1 and is clipped separately (sfr_clip_grad). 'loss': the whole
    loss, with one gradient norm for head and backbone, as in the authors' code; a large weight then shrinks the
    backbone's update."""
    warmup: Literal["head_only", "detached"] = "head_only"
    """Phase A. 'head_only' (default): only the head trains and the backbone's gradient is exactly zero (weight decay
    still applies to the backbone). 'detached': the backbone trains on cross-entropy while the head trains on detached
    hidden states."""
    warmup_steps: int = 0
    """Length of phase A in steps. Default 0."""
    ramp_steps: int = 0
    """Length of phase B in steps: SFR's gradient reaches the backbone, with a weight that rises linearly from 0.
    Default 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Phase C: how the weight changes over the remaining steps. 'constant' (default) keeps it; 'linear' and 'cosine'
    decay it to 0."""
    weight_control: Literal["fixed", "ratio"] = "fixed"
    """'fixed' (default) uses sfr_weight. 'ratio' adapts the weight to keep the norm of SFR's gradient at h at
    sfr_grad_ratio times cross-entropy's. The adaptive weight starts from a measurement at the last step of phase A and
    stays within a factor of 10,000 of sfr_weight."""
    grad_ratio: float = 0.1
    """Target ratio of the gradient norms at h, for sfr_weight_control = ratio. Default 0.1."""
    measure_interval: int = 50
    """Steps between measurements of the gradient ratio and of its noise-free share; 0 never measures. The last step of
    phase A is always measured too. Default 50."""

    def __post_init__(self) -> None:
        for name in ("weight", "warmup_steps", "ramp_steps", "measure_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` = {getattr(self, name)}: must not be negative")
        if self.weight_control == "ratio" and self.grad_ratio <= 0:
            raise ValueError(f"`grad_ratio` = {self.grad_ratio}: an adaptive weight needs a ratio above 0")
        if self.weight_control == "ratio" and self.measure_interval == 0:
            raise ValueError("`weight_control` = ratio needs measurements: set `measure_interval` above 0")
        if self.weight_control == "ratio" and self.weight == 0:
            raise ValueError("`weight_control` = ratio adapts the weight around `weight`: set it above 0")


@dataclass(frozen=True)
class Phase:
    """How one step combines the two losses."""

    cross_entropy: float
    """Weight of cross-entropy: 0 or 1."""
    share: float
    """Fraction of the full SFR weight at this step, in [0, 1]."""
    detach: bool
    """Whether the head reads detached hidden states, so that only the head learns."""


def phase_at(step: int, total_steps: int, options: ScheduleOptions) -> Phase:
    """The phase of a 0-based step in a run of total_steps.

    A: step < warmup. B: share = (step - warmup) / ramp. C: share = 1, 1 - u or (1 + cos(pi u)) / 2, where u is the
    progress through the steps after B.
    """
    after_warmup = step - options.warmup_steps
    if after_warmup < 0:
        return Phase(cross_entropy=float(options.warmup == "detached"), share=1.0, detach=True)
    share = 1.0
    if after_warmup < options.ramp_steps:
        share = after_warmup / options.ramp_steps
    elif options.decay != "constant":
        remaining = total_steps - options.warmup_steps - options.ramp_steps
        u = min(1.0, (after_warmup - options.ramp_steps) / max(1, remaining))
        share = 1 - u if options.decay == "linear" else 0.5 * (1 + math.cos(math.pi * u))
    # Detach at weight 0 too: 0 * inf would be NaN, and an absent gradient is exactly zero.
    return Phase(cross_entropy=1.0, share=share, detach=share == 0 or options.weight == 0)
