"""Options of KL-flow's samplers, and the time grid of a sequence."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["basic", "sampling", "hybrid"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_STEPS = 512
MOST_STEPS = 4095  # the noise counter has 12 bits for the draw, and draw 0 is the initial noise


@dataclass(frozen=True)
class SamplerOptions:
    """Sampling of Logit-KL Flow Matching (arXiv 2411.16821). Times t are those of training, from 0 to t_max."""

    method: Method = "hybrid"
    """'basic' solves the flow's ODE. 'sampling' draws all tokens at each step and adds new noise. 'hybrid' (default) is
    basic while t < t_split, then sampling."""
    steps: int | None = None
    """Steps per sequence. Default: the number of free positions, or 512 if every position is free. The authors' code
    takes the free positions of the longest sequence in a batch, also where nothing is given."""
    top_k: int = 0
    """Draw tokens among the k most likely ones; 1: the most likely token. Default 0: all tokens. The authors' code has
    1, which collapses unless most of the path is 'basic' (docs/kl_flow.md)."""
    temperature: float = 1.0
    """Temperature of drawn tokens. Default 1. Has no effect on steps of the ODE, which draw no tokens."""
    final_top_k: int = 1
    """top_k for the final tokens, which are decoded at t_max. Default 1: the most likely token."""
    t_max: float = 0.3
    """End of the time grid, kl_flow_t_max of training. Default 0.3."""
    t_split: float = 0.28
    """Time at which 'hybrid' switches from the ODE to drawing tokens. Default 0.28."""
    seed: int = 0
    """Seed of the noise and of the drawn tokens. Default 0."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if not 0 < self.t_max < 1:
            raise ValueError(f"t_max is {self.t_max}; give the time where training ends, above 0 and below 1")
        if not 0 <= self.t_split <= 1:
            raise ValueError(f"t_split is {self.t_split}; give a time from 0 (all sampling) to t_max (all basic)")
        if self.steps is not None and not self.fewest_steps <= self.steps <= MOST_STEPS:
            raise ValueError(
                f"steps is {self.steps}; give {self.fewest_steps} to {MOST_STEPS}: a step of -ln(1 - t) stays below 1"
            )
        if self.top_k < 0 or self.final_top_k < 0 or not 0 < self.temperature < math.inf:
            raise ValueError("give top_k and final_top_k of at least 0 (1: the most likely token), temperature above 0")

    @property
    def length(self) -> float:
        """Length of the interval from t = 0 to t_max in t' = -ln(1 - t), where the ODE is dl/dt' = E[l1] - l."""
        return -math.log1p(-self.t_max)

    @property
    def fewest_steps(self) -> int:
        """The fewest steps of length below 1. A longer Euler step of dl/dt' = E[l1] - l discards or inverts l."""
        return math.floor(self.length) + 1

    def steps_of(self, free_BS: Tensor) -> Tensor:
        """Number of steps of each sequence, from its free positions: int64 [B]."""
        if self.steps is not None:
            return torch.full(free_BS.shape[:1], self.steps, device=free_BS.device)
        free_B = free_BS.sum(dim=1).clamp(self.fewest_steps, MOST_STEPS)
        return torch.where(free_BS.all(dim=1), DEFAULT_STEPS, free_B)

    def draws_on_the_way(self, steps: int) -> bool:
        """Whether any of the steps draws tokens. A hybrid of few steps may not: none of them starts after t_split."""
        begins = float(self.time(steps - 1, torch.tensor([steps])))
        return self.method == "sampling" or (self.method == "hybrid" and begins >= self.t_split)

    def time(self, step: int, steps_B: Tensor) -> Tensor:
        """t of a step in sequences of steps_B steps, float64 [B]: 1 - exp(-step h), h = -ln(1 - t_max) / steps."""
        return 1 - torch.exp(-step * self.length / steps_B.double())
