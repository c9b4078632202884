"""What the seeds amount to: how far each arm's frontier lies from the baseline's, and whether that is more than noise.

A frontier is a curve over temperatures (evaluation/compare/frontier.py). An arm's curve is the mean of its seeds'
curves; its interval resamples seeds and headwords together. How far apart two seeds of the baseline lie is the noise of
training, which an effect has to exceed before it is called one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_sfr.evaluation.compare.curves import Curve
from megatron_sfr.evaluation.compare.frontier import gap
from megatron_sfr.evaluation.compare.report import Axes
from megatron_sfr.evaluation.scores.bootstrap import DRAWS, Estimate, interval

NO_EFFECT = "no difference beyond noise"


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline in one measure, with its interval over seeds and headwords.

    by_seed: a seed minus the same seed. noise: the largest |difference| between two seeds of the baseline.
    """

    estimate: Estimate
    by_seed: tuple[float, ...]
    noise: float

    @property
    def moved(self) -> bool:
        """The interval excludes 0, the seeds agree on the sign, and two seeds of the baseline differ by less."""
        sign = np.sign(self.estimate.mean)
        excluded = self.estimate.low > 0 or self.estimate.high < 0
        return bool(excluded and all(np.sign(g) == sign for g in self.by_seed) and abs(self.estimate.mean) > self.noise)

    @property
    def gap(self) -> str:
        return f"{self.estimate.mean:+.3f} [{self.estimate.low:+.3f}, {self.estimate.high:+.3f}]"

    @property
    def seeds(self) -> str:
        return ", ".join(f"{g:+.3f}" for g in self.by_seed)


@dataclass(frozen=True)
class Verdict(Difference):
    """An arm against the baseline on one pair of axes: the gap between their frontiers."""

    arm: str
    axes: Axes

    @property
    def measure(self) -> str:
        return f"{self.axes.label} at equal {self.axes.quality}"

    @property
    def judged(self) -> str:
        if not self.moved:
            return NO_EFFECT
        return f"{'more' if self.estimate.mean > 0 else 'less'} diverse at equal quality, beyond noise"

    @property
    def sentence(self) -> str:
        return (
            f"{self.arm}: {self.measure}: {self.gap}, by seed {self.seeds}; two seeds of the baseline lie up to "
            f"{self.noise:.3f} apart: {self.judged}."
        )


def compare(arm: str, curves: Sequence[Curve], baseline: Sequence[Curve], axes: Axes) -> Verdict:
    """curves and baseline: one a seed, in the same order of seeds."""
    a, b = _arrays(axes, baseline, curves)
    n = a.shape[-1]
    everything = np.arange(n)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS // 4):
        seeds, prompts = generator.integers(len(a), size=len(a)), generator.integers(n, size=n)
        drawn.append(_gap(a[seeds], b[seeds], prompts))
    by_seed = tuple(_gap(x[None], y[None], everything) for x, y in zip(a, b, strict=True))
    noise = max(abs(_gap(x[None], y[None], everything)) for x, y in combinations(a, 2))
    estimate = Estimate(_gap(a, b, everything), *interval(np.array(drawn)), n)
    return Verdict(estimate, by_seed, noise, arm, axes)


def mean_gap(axes: Axes, curves: Sequence[Curve], baseline: Sequence[Curve]) -> float:
    """How far the mean curve of some runs lies above that of others; NaN where they share no quality."""
    a, b = _arrays(axes, baseline, curves)
    return _gap(a, b, np.arange(a.shape[-1]))


def _arrays(axes: Axes, *groups: Sequence[Curve]) -> list[np.ndarray]:
    """Quality and diversity of each group, [run, 2, T, P], over the headwords that have both in every run."""
    pairs = [[np.stack(axes.of(curve)) for curve in group] for group in groups]
    used = ~np.any([np.isnan(pair).any(axis=(0, 1)) for group in pairs for pair in group], axis=0)
    if not used.any():
        raise ValueError(f"no headword has both {axes.quality} and {axes.diversity} in every run")
    return [np.stack(group)[..., used] for group in pairs]


def _gap(a: np.ndarray, b: np.ndarray, prompts: np.ndarray) -> float:
    """Of the mean curves of two groups of runs [seed, 2, T, P] over these prompts."""
    line_a, line_b = (group.mean(axis=0)[:, :, prompts].mean(axis=2) for group in (a, b))
    return gap((line_a[0], line_a[1]), (line_b[0], line_b[1]))
