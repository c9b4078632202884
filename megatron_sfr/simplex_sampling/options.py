"""How KL-flow samples: the method and its constants, and the grid of times that a row takes."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["basic", "sampling", "hybrid"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_STEPS = 512
MOST_STEPS = 4095  # the generator's counter gives the draw twelve bits, and the first noise has one


@dataclass(frozen=True)
class SamplerOptions:
    """Logit-KL Flow Matching (arXiv 2411.16821), inference. Times t are those of training, from 0 to t_max."""

    method: Method = "hybrid"
    """'basic': the flow's differential equation. 'sampling': at each step a draw of all tokens and fresh noise.
    'hybrid': basic while t < t_split, then sampling."""
    steps: int | None = None
    """Steps of a row. None: as many as it has free positions if some are given, else 512."""
    top_k: int = 0
    """Tokens are drawn among the k likeliest; 1: the likeliest, 0: all."""
    temperature: float = 1.0
    """Divides the logits of what is drawn. The differential equation draws nothing and knows no temperature."""
    final_top_k: int = 1
    """As top_k, for the tokens that are read off at t_max."""
    t_max: float = 0.3
    """Where training's times end."""
    t_split: float = 0.28
    """Where hybrid turns from the differential equation to draws."""
    seed: int = 0

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
            raise ValueError("top_k and final_top_k are at least 0, temperature is above 0; top_k 1 is the likeliest")

    @property
    def length(self) -> float:
        """From t = 0 to t_max in the time t' = -ln(1 - t), in which the equation is dl/dt' = E[l1] - l."""
        return -math.log1p(-self.t_max)

    @property
    def fewest_steps(self) -> int:
        """An Euler step of dl/dt' = E[l1] - l of length 1 forgets l, and a longer one turns it over."""
        return math.floor(self.length) + 1

    def steps_of(self, free_BS: Tensor) -> Tensor:
        """Steps of each row, by which of its positions are free: int64 [B]."""
        if self.steps is not None:
            return torch.full(free_BS.shape[:1], self.steps, device=free_BS.device)
        free_B = free_BS.sum(dim=1).clamp(self.fewest_steps, MOST_STEPS)
        return torch.where(free_BS.all(dim=1), DEFAULT_STEPS, free_B)

    def draws_on_the_way(self, steps: int) -> bool:
        """Whether any of a row's steps is a draw; a hybrid of few steps is basic, for none begins beyond t_split."""
        begins = float(self.time(steps - 1, torch.tensor([steps])))
        return self.method == "sampling" or (self.method == "hybrid" and begins >= self.t_split)

    def time(self, step: int, steps_B: Tensor) -> Tensor:
        """t of a step in rows of so many steps, float64 [B]: 1 - exp(-step h), h = -ln(1 - t_max) / steps."""
        return 1 - torch.exp(-step * self.length / steps_B.double())
