"""Cluster bootstrap over prompts: all scores of a prompt are resampled together."""

from dataclasses import dataclass
from functools import lru_cache

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
        if not self.n:
            return "-"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


NO_VALUE = Estimate(float("nan"), float("nan"), float("nan"), 0)
"""The estimate of no prompts."""


@lru_cache(maxsize=4)  # 16 kB for each of the n prompts
def resamples(n: int) -> np.ndarray:
    """Indices [DRAWS, n] drawn with replacement; equal for equal n, so that compared models are resampled together."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def estimate(values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """The (weighted) mean of one value per prompt [prompts], with its interval. Prompts with NaN are skipped."""
    used = ~np.isnan(values)
    n = int(used.sum())
    if not n:
        return NO_VALUE
    value = values[used]
    weight = np.ones(n) if weights is None else weights[used]
    rows = resamples(n)
    drawn = (value * weight)[rows].sum(axis=1) / weight[rows].sum(axis=1)
    return Estimate(float(np.average(value, weights=weight)), *interval(drawn), n)


def ratio(values: np.ndarray, base: np.ndarray) -> Estimate:
    """Mean of `values` over the mean of `base`, one value per prompt each [prompts]. Prompts with NaN are skipped.

    No value if the mean of `base` is 0.
    """
    used = ~np.isnan(values) & ~np.isnan(base)
    n = int(used.sum())
    if not n or not base[used].sum():
        return NO_VALUE
    value, below = values[used], base[used]
    rows = resamples(n)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw whose base is 0 has no value
        drawn = value[rows].sum(axis=1) / below[rows].sum(axis=1)
    return Estimate(float(value.sum() / below.sum()), *interval(drawn[np.isfinite(drawn)]), n)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws; draws without a value are skipped."""
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
