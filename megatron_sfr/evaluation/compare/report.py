"""Summary of the curves: estimates with intervals, gaps between each frontier and the first one, and personas."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sfr.evaluation.compare.curves import Curve, Loss, Scorer, Scores
from megatron_sfr.evaluation.compare.frontier import Gap, bootstrap_gap
from megatron_sfr.evaluation.compare.questions import sorted_temperatures
from megatron_sfr.evaluation.scores.bootstrap import NO_VALUE, Estimate, estimate, ratio
from megatron_sfr.evaluation.scores.embeddings import similarity
from megatron_sfr.evaluation.scores.metrics import metric

REAL = "real replies"
PERSONAS = 24
"""Whose frontiers are reported."""


@dataclass(frozen=True)
class Axes:
    """One panel: a score of quality and a score of diversity, oriented so that more is better on both."""

    quality: str
    diversity: str

    @property
    def is_turned(self) -> bool:
        """Whether the plot shows 1 - diversity."""
        return metric(self.diversity).lower

    @property
    def label(self) -> str:
        return f"1 − {self.diversity}" if self.is_turned else self.diversity

    def turned(self, estimate: Estimate) -> Estimate:
        """A diversity as the plot shows it."""
        if not self.is_turned:
            return estimate
        return Estimate(1 - estimate.mean, 1 - estimate.high, 1 - estimate.low, estimate.n)

    def of(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """(quality, diversity), each [T, P]."""
        diversity = curve.scores[self.diversity]
        return curve.scores[self.quality], 1 - diversity if self.is_turned else diversity


@dataclass(frozen=True)
class Similarity:
    """Mean cosine of the replies of two models, or of one, to the same prompt and persona."""

    model: str
    other: str
    """The same model, another one, or `REAL`."""
    temperature: float | None
    estimate: Estimate


@dataclass(frozen=True)
class PersonaFrontiers:
    """One frontier per persona, model and temperature, over the prompts that the persona answers."""

    axes: Axes
    has_quality: bool
    """False: no score of quality has a value for single personas, and only the diversity is known."""
    estimates: Mapping[str, Mapping[str, Sequence[tuple[Estimate, Estimate]]]]
    """(quality, diversity) by persona, model and temperature of the report."""
    left_out: int
    """Number of other personas, which have fewer prompts."""


@dataclass(frozen=True)
class Report:
    """Everything reported. scores: by model and score, one per temperature, without a value at temperatures that only
    other models have; losses: by model and set, nats per token.

    real: scores of the real replies. perplexities: by model and persona, exp of the nats per token of the real replies.
    """

    prompts: int
    """Number of shared prompts, which are resampled."""
    temperatures: tuple[float | None, ...]
    """Of all models; None where unknown."""
    axes: tuple[Axes, ...]
    scores: dict[str, dict[str, list[Estimate]]]
    real: dict[str, Estimate]
    losses: dict[str, dict[str, Estimate]]
    perplexities: dict[str, dict[str, Estimate]]
    gaps: list[Gap]
    notes: tuple[str, ...]
    similarity: tuple[Similarity, ...] = ()
    """Within and across models; empty for a single model."""
    personas: PersonaFrontiers | None = None
    """None for fewer than two personas."""


def summarize(
    curves: Sequence[Curve],
    axes: Sequence[Axes],
    notes: Sequence[str],
    real: Scores,
    similarity: Sequence[Similarity] = (),
    personas: Sequence[str] = (),
) -> Report:
    """Every model's estimates, and its gap to the first model on all axes.

    real: scores of the real replies. personas: of each entry of `asked`, for the frontiers by persona.
    """
    first = curves[0]
    prompts = next(iter(first.scores.values())).shape[1]
    temperatures = sorted_temperatures(t for curve in curves for t in curve.temperatures)
    return Report(
        prompts=prompts,
        temperatures=tuple(temperatures),
        axes=tuple(axes),
        scores={curve.model: _scores(curve, real, temperatures) for curve in curves},
        real={name: estimate(row) for name, row in real.items()} | _ratio(real.get("collisions"), real),
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
        similarity=tuple(similarity),
        personas=_persona_frontiers(curves, axes, personas, temperatures),
    )


def _persona_frontiers(
    curves: Sequence[Curve], axes: Sequence[Axes], personas: Sequence[str], temperatures: Sequence[float | None]
) -> PersonaFrontiers | None:
    """Of the personas with the most prompts, on the first of the axes' scores that single personas have."""
    entries: dict[str, list[int]] = defaultdict(list)
    for i, persona in enumerate(personas):
        entries[persona].append(i)
    quality = _known([*(axis.quality for axis in axes), "style fidelity", "context"], curves)
    diversity = _known([*(axis.diversity for axis in axes), "self-BLEU-4", "distinct-2"], curves)
    if len(entries) < 2 or diversity is None:
        return None

    def of(curve: Curve, temperature: float | None, name: str | None, persona: str) -> Estimate:
        if name is None or name not in curve.entries or temperature not in curve.temperatures:
            return NO_VALUE
        return estimate(curve.entries[name][curve.temperatures.index(temperature), entries[persona]])

    chosen = sorted(sorted(entries, key=lambda persona: -len(entries[persona]))[:PERSONAS])
    found = {
        persona: {
            curve.model: [(of(curve, t, quality, persona), of(curve, t, diversity, persona)) for t in temperatures]
            for curve in curves
        }
        for persona in chosen
    }
    return PersonaFrontiers(Axes(quality or "", diversity), quality is not None, found, len(entries) - len(chosen))


def _known(names: Sequence[str], curves: Sequence[Curve]) -> str | None:
    """The first score that has a value for some entry."""
    return next(
        (name for name in names for c in curves if name in c.entries and not np.isnan(c.entries[name]).all()), None
    )


def similarities(curves: Sequence[Curve], scorer: Scorer) -> list[Similarity]:
    """For each temperature every pair of models that have it, every model itself, and every model and the real replies.

    Models may share random numbers, so samples of the same index are not compared.
    """
    found = []
    for temperature in sorted_temperatures(t for curve in curves for t in curve.temperatures):
        at = {
            curve.model: curve.vectors[curve.temperatures.index(temperature)]
            for curve in curves
            if temperature in curve.temperatures
        }
        names = list(at)
        for i, model in enumerate(names):
            for other in (*names[i:], REAL):
                pairs = zip(at[model], scorer.references if other == REAL else at[other], strict=True)
                values = scorer.by_prompt([similarity(a, b, paired=other != REAL) for a, b in pairs])
                found.append(Similarity(model, other, temperature, estimate(values)))
    return found if len(curves) > 1 and any(pair.estimate.n for pair in found) else []


def _scores(curve: Curve, real: Scores, temperatures: Sequence[float | None]) -> dict[str, list[Estimate]]:
    """Estimates of each score at each temperature of the report, of which the curve may have only some."""
    found: dict[str, list[Estimate]] = {}
    nothing = np.full(len(next(iter(curve.scores.values()))[0]), np.nan)
    for temperature in temperatures:
        known = temperature in curve.temperatures
        at = curve.temperatures.index(temperature) if known else None
        scores = {name: nothing if at is None else rows[at] for name, rows in curve.scores.items()}
        estimates = {name: estimate(row) for name, row in scores.items()} | _ratio(scores.get("collisions"), real)
        for name, value in estimates.items():
            found.setdefault(name, []).append(value)
    return found


def _ratio(collisions: np.ndarray | None, real: Scores) -> dict[str, Estimate]:
    """The collision ratio: a ratio of means, because many prompts have no two real replies of the same meaning."""
    return {} if collisions is None else {"collision ratio": ratio(collisions, real["collisions"])}


def _nats(loss: Loss) -> Estimate:
    return estimate(loss.per_token, loss.tokens)


def _exp(nats: Estimate) -> Estimate:
    """exp of mean and interval. exp is monotone, so quantiles stay quantiles."""
    mean, low, high = np.exp([nats.mean, nats.low, nats.high]).tolist()
    return Estimate(mean, low, high, nats.n)


def verdict(gap: Gap) -> str:
    """One sentence about a gap that claims no more than its interval supports."""
    low, high = gap.range
    if np.isnan(gap.estimate.mean):
        return f"{gap.model} and {gap.baseline} reach no {gap.quality} in common: {gap.diversity} cannot be compared."
    found = f"{gap.estimate.mean:+.3f} [{gap.estimate.low:+.3f}, {gap.estimate.high:+.3f}]"
    if not gap.is_beyond_noise:
        judged = "no difference beyond noise"
    else:
        higher = gap.model if gap.estimate.mean > 0 else gap.baseline
        judged = f"{higher} lies higher, beyond sampling noise; with one run each the training seed may explain it"
    return (
        f"{gap.diversity}, {gap.model} against {gap.baseline} at equal {gap.quality} "
        f"({low:.2f} to {high:.2f}): {found}: {judged}."
    )
