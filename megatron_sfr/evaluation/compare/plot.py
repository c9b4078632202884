"""The plot: one panel for each pair of scores, diversity against quality, with one curve per model."""

import math
from pathlib import Path

from megatron_sfr.evaluation.compare.questions import shown_temperature
from megatron_sfr.evaluation.compare.report import Axes, Report
from megatron_sfr.evaluation.page.persona_panels import COLOURS
from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.storage.atomic import replacing

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_LABELLED = 3  # with more curves, only the first one's temperatures are written; the others have the same order


def draw(report: Report, path: Path, title: str) -> None:
    """Writes the PNG atomically. Crosses are the 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(report.axes), 4.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for panel, axes in zip(figure.subplots(1, len(report.axes), squeeze=False)[0], report.axes, strict=True):
        for i, model in enumerate(report.scores):
            _curve(panel, report, axes, model, i)
        panel.set_xlabel(f"{axes.quality}  (better →)")
        panel.set_ylabel(f"{axes.label}  (more diverse →)")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.12)  # room for the labels
    figure.suptitle(title, fontsize=11)
    curves = figure.axes[0].get_legend_handles_labels()
    columns = math.ceil(len(report.scores) / math.ceil(len(report.scores) / 6))  # rows of at most six, next to equal
    figure.legend(*curves, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png")


def _curve(panel, report: Report, axes: Axes, model: str, i: int) -> None:  # type: ignore[no-untyped-def]
    """One model's polyline through its temperatures, which are written beside the points if there is room."""
    scores = report.scores[model]
    points = list(zip(report.temperatures, scores[axes.quality], scores[axes.diversity], strict=True))
    points = [point for point in points if point[1].n and point[2].n]
    temperatures = [temperature for temperature, _, _ in points]
    quality = [estimate for _, estimate, _ in points]
    diversity = [axes.turned(estimate) for _, _, estimate in points]
    x, y = [e.mean for e in quality], [e.mean for e in diversity]
    colour = COLOURS[i % len(COLOURS)]
    panel.errorbar(
        x, y, xerr=_arms(quality), yerr=_arms(diversity), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.45
    )
    panel.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.5, label=model)
    if i > 0 and len(report.scores) > MOST_LABELLED:
        return
    side = -1 if i % 2 == 0 else 1  # labels of neighbouring models are on different sides
    for temperature, at_x, at_y in zip(temperatures, x, y, strict=True):
        panel.annotate(
            f"T {shown_temperature(temperature)}",
            (at_x, at_y),
            textcoords="offset points",
            xytext=(7 * side, 8 * side),
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=7.5,
            color=colour,
        )


def _arms(estimates: list[Estimate]) -> list[list[float]]:
    return [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]
