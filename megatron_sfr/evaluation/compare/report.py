"""What the curves amount to: estimates with intervals, and how far frontiers lie from the first one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sfr.evaluation.compare.curves import Curve, Loss, Scores
from megatron_sfr.evaluation.compare.frontier import Gap, bootstrap_gap
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate
from megatron_sfr.evaluation.scores.metrics import metric


@dataclass(frozen=True)
class Axes:
    """One panel: a score of quality and a score of diversity, turned so that more is better on both."""

    quality: str
    diversity: str

    @property
    def is_turned(self) -> bool:
        """Whether the picture shows 1 - diversity."""
        return metric(self.diversity).lower

    @property
    def label(self) -> str:
        return f"1 − {self.diversity}" if self.is_turned else self.diversity

    def of(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """(quality, diversity), each [T, P]."""
        diversity = curve.scores[self.diversity]
        return curve.scores[self.quality], 1 - diversity if self.is_turned else diversity


@dataclass(frozen=True)
class Report:
    """All that is told. scores: model, score, one a temperature; losses: model, set of replies, nats a token.

    real: score of the real replies. perplexities: model, persona, exp of the nats a token of that persona's replies.
    """

    prompts: int  # shared prompts: what is resampled
    temperatures: tuple[float, ...]
    axes: tuple[Axes, ...]
    scores: dict[str, dict[str, list[Estimate]]]
    real: dict[str, Estimate]
    losses: dict[str, dict[str, Estimate]]
    perplexities: dict[str, dict[str, Estimate]]
    gaps: list[Gap]
    notes: tuple[str, ...]


def summarise(curves: Sequence[Curve], axes: Sequence[Axes], notes: Sequence[str], real: Scores) -> Report:
    """Every model's estimates, and its gap to the first model on all axes; real: the real replies' own scores."""
    first = curves[0]
    prompts = next(iter(first.scores.values())).shape[1]
    return Report(
        prompts=prompts,
        temperatures=first.temperatures,
        axes=tuple(axes),
        scores={
            curve.model: {name: [estimate(row) for row in rows] for name, rows in curve.scores.items()}
            for curve in curves
        },
        real={name: estimate(row) for name, row in real.items()},
        losses={curve.model: {name: _nats(loss) for name, loss in curve.losses.items()} for curve in curves},
        perplexities={
            curve.model: {name: _exp(_nats(loss)) for name, loss in curve.personas.items()} for curve in curves
        },
        gaps=[
            Gap(
                first.model,
                curve.model,
                axis.quality,
                axis.label,
                *bootstrap_gap(axis.of(first), axis.of(curve)),
            )
            for curve in curves[1:]
            for axis in axes
        ],
        notes=tuple(notes),
    )


def _nats(loss: Loss) -> Estimate:
    return estimate(loss.per_token, loss.tokens)


def _exp(nats: Estimate) -> Estimate:
    """Of mean and interval: exp is monotone, so the quantiles are those of the perplexity."""
    mean, low, high = np.exp([nats.mean, nats.low, nats.high]).tolist()
    return Estimate(mean, low, high, nats.n)


def verdict(gap: Gap) -> str:
    """One sentence that says no more than the interval allows."""
    low, high = gap.range
    if np.isnan(gap.estimate.mean):
        return f"{gap.model} and {gap.baseline} reach no {gap.quality} in common: {gap.diversity} cannot be compared."
    found = f"{gap.estimate.mean:+.3f} [{gap.estimate.low:+.3f}, {gap.estimate.high:+.3f}]"
    if not gap.is_beyond_noise:
        judged = "no difference beyond noise"
    else:
        higher = gap.model if gap.estimate.mean > 0 else gap.baseline
        judged = f"{higher} lies higher, beyond sampling noise; one run of each cannot tell it from the training seed"
    return (
        f"{gap.diversity}, {gap.model} against {gap.baseline} at equal {gap.quality} "
        f"({low:.2f} to {high:.2f}): {found}: {judged}."
    )
