"""Summarizes each model at locks and at forks, and plots the labels by position in the reply and by persona.

At locks a good model is confident and correct: training should not worsen cross-entropy, top-1 and tail probability. At
forks it keeps several continuations: entropy and effective support exp(H) should stay high.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sfr.evaluation.lock_fork.futures import Futures
from megatron_sfr.evaluation.lock_fork.labels import LABELS, Labelled
from megatron_sfr.evaluation.lock_fork.token_statistics import Positions, Reading

BINS = 10  # of a reply's length
COLOURS = {"lock": "#2e86ab", "neutral": "#c9ced8", "fork": "#d1495b"}
Estimate = Callable[[np.ndarray, np.ndarray], Any]  # (values per sample, their weights) -> a printable estimate


@dataclass(frozen=True)
class Diagnosis:
    """Readings by model name, the base first; the labels of the base, and its futures if it has a flow head."""

    where: Positions
    readings: Mapping[str, Reading]
    labelled: Labelled
    futures: Futures | None

    @property
    def base(self) -> str:
        return next(iter(self.readings))


def table(diagnosis: Diagnosis, estimate: Estimate) -> list[list[str]]:
    """A table as text, one row per model, label and measure. `estimate` resamples samples, weighted by positions."""
    rows = []
    for name, reading in diagnosis.readings.items():
        at_lock = {"CE": reading.nll, "top-1 mass": reading.top, "tail mass": reading.tail}
        at_fork = {"CE": reading.nll, "entropy": reading.entropy, "support exp(H)": np.exp(reading.entropy)}
        if name == diagnosis.base and diagnosis.futures is not None:
            expected = diagnosis.futures
            at_fork |= {"dispersion": expected.dispersion, "clusters": expected.clusters, "gain (nats)": expected.gain}
        for label, measures in (("lock", at_lock), ("fork", at_fork)):
            chosen = diagnosis.labelled.label == label
            for measure, values in measures.items():
                shown = str(estimate(*by_sample(values, chosen, diagnosis.where.sample)))
                rows.append([name, label, measure, shown, f"{chosen.sum():,}"])
    return [["model", "at", "measure", "mean [95 % interval over samples]", "positions"], *rows]


def by_sample(values: np.ndarray, chosen: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the chosen values [N] per sample (NaN if none is chosen), and their count."""
    index = np.unique(sample, return_inverse=True)[1]
    count = np.bincount(index, chosen)
    total = np.bincount(index, np.where(chosen, values, 0))
    return total / np.where(count > 0, count, np.nan), count


def as_json(diagnosis: Diagnosis, rows: Sequence[Sequence[str]]) -> str:
    """JSON with the rule, the table, and the labels and statistics of all positions as columns."""
    where = diagnosis.where
    columns: dict[str, np.ndarray] = {
        **{name: getattr(where, name) for name in ("sample", "place", "token", "persona")},
        "label": diagnosis.labelled.label,
    }
    if diagnosis.futures is not None:
        columns |= {name: getattr(diagnosis.futures, name) for name in ("dispersion", "clusters", "gain")}
    models = {
        name: {key: values.round(4).tolist() for key, values in vars(reading).items()}
        for name, reading in diagnosis.readings.items()
    }
    content = {
        "base": diagnosis.base,
        "rule": diagnosis.labelled.rule,
        "table": rows,
        "positions": {name: values.tolist() for name, values in columns.items()},
        "models": models,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def shares(diagnosis: Diagnosis, group: np.ndarray) -> dict[str, list[float]]:
    """Each label's share of the positions in each group. group [N]: the position's group; groups are sorted."""
    return {
        label: [float(np.mean(diagnosis.labelled.label[group == one] == label)) for one in np.unique(group)]
        for label in LABELS
    }


def picture(diagnosis: Diagnosis) -> bytes:
    """A PNG with the shares of the labels by position in the reply and by persona."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    tenth = np.floor(diagnosis.where.relative * BINS)
    personas = diagnosis.where.persona
    named = [str(name) or "no persona" for name in np.unique(personas)]
    places = [f"{x:g}" for x in np.unique(tenth)]
    panels = (("position in the reply, in tenths", tenth, places), ("persona", personas, named))
    for axes, (title, group, ticks) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        below = np.zeros(len(ticks))
        for label, share in shares(diagnosis, group).items():
            axes.bar(range(len(ticks)), share, bottom=below, color=COLOURS[label], label=label)
            below = below + share
        axes.set_xticks(range(len(ticks)), ticks, rotation=45 if title == "persona" else 0, fontsize=8)
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of positions")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
