"""Frontiers: models are compared by their curves over temperatures, diversity against quality.

best(q) is the highest diversity of a model at quality q or better, on the polyline through its temperatures. Two models
are compared over the range of q that both reach: gap = mean of best_b(q) - best_a(q), which is the area between the two
frontiers divided by its width.
"""

from dataclasses import dataclass

import numpy as np

from megatron_sfr.evaluation.scores.bootstrap import NO_VALUE, Estimate, interval, resamples

Line = tuple[np.ndarray, np.ndarray]  # quality [T], diversity [T]: one point per temperature
GRID = 65  # values of q, and points per segment of a polyline


@dataclass(frozen=True)
class Gap:
    """Mean height of the frontier of `model` above that of `baseline`, over the shared range of quality."""

    baseline: str
    model: str
    quality: str
    diversity: str
    estimate: Estimate
    range: tuple[float, float]

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.estimate.low > 0 or self.estimate.high < 0


def best(quality_T: np.ndarray, diversity_T: np.ndarray, at_G: np.ndarray) -> np.ndarray:
    """The highest diversity [G] at quality q or better on the polyline through T points; NaN if q is not reached."""
    share = np.linspace(0, 1, GRID)
    quality, diversity = (
        np.concatenate([(values[:-1, None] * (1 - share) + values[1:, None] * share).ravel(), values[-1:]])
        for values in (quality_T, diversity_T)
    )
    order = np.argsort(-quality, kind="stable")
    highest = np.maximum.accumulate(diversity[order])
    reached = np.searchsorted(-quality[order], -at_G, side="right")  # points with quality >= q
    return np.where(reached > 0, highest[np.maximum(reached - 1, 0)], np.nan)


def shared_range(quality_a: np.ndarray, quality_b: np.ndarray) -> tuple[float, float]:
    """Range of quality that both curves reach; low > high if there is none."""
    return max(quality_a.min(), quality_b.min()), min(quality_a.max(), quality_b.max())


def gap(curve_a: Line, curve_b: Line) -> float:
    """Mean of best_b - best_a over the shared range of quality; NaN if that has no width."""
    low, high = shared_range(curve_a[0], curve_b[0])
    if not low < high:
        return float("nan")
    grid = np.linspace(low, high, GRID)
    return float(np.mean(best(*curve_b, grid) - best(*curve_a, grid)))


def bootstrap_gap(curve_a: Line, curve_b: Line) -> tuple[Estimate, tuple[float, float]]:
    """The gap with its interval, and its range. Here the curves have a value for each prompt: [T, P] instead of [T].

    Both models answer the same prompts with the same random numbers, so prompts are resampled for both at once.
    """
    used = ~np.isnan(np.concatenate([*curve_a, *curve_b])).any(axis=0)
    n = int(used.sum())
    if not n:
        return NO_VALUE, (float("nan"), float("nan"))

    def mean(curve: Line, rows: np.ndarray) -> Line:
        return curve[0][:, used][:, rows].mean(axis=1), curve[1][:, used][:, rows].mean(axis=1)

    everything = np.arange(n)
    line_a, line_b = mean(curve_a, everything), mean(curve_b, everything)
    drawn = np.array([gap(mean(curve_a, rows), mean(curve_b, rows)) for rows in resamples(n)])
    low, high = shared_range(line_a[0], line_b[0])
    return Estimate(gap(line_a, line_b), *interval(drawn), n), (float(low), float(high))
