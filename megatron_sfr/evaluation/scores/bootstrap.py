"""Intervals by resampling prompts: whatever is said about the same prompt rises and falls together."""

from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, its 95 % bootstrap interval, and the number of prompts that have a value."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@cache
def resamples(n: int) -> np.ndarray:
    """Indices [DRAWS, n] drawn with replacement: always the same, so whatever is compared is resampled together."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def estimate(values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """Of the (weighted) mean of one value a prompt [prompts]; prompts whose value is NaN are left out."""
    used = ~np.isnan(values)
    n = int(used.sum())
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    value = values[used]
    weight = np.ones(n) if weights is None else weights[used]
    rows = resamples(n)
    drawn = (value * weight)[rows].sum(axis=1) / weight[rows].sum(axis=1)
    return Estimate(float(np.average(value, weights=weight)), *interval(drawn), n)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws; draws without a value are left out."""
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
