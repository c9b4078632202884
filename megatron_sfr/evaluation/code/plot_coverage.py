"""The plot of coverage@k: pass@k over k, beside what a choice among the k replies makes of it."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sfr.evaluation.code.score import Passes
from megatron_sfr.evaluation.page.persona_panels import COLOURS
from megatron_sfr.storage.atomic import replacing

STYLES = {"best by utility": "--", "best by logprob": "-.", "majority": ":"}


def draw_coverage(scored: Sequence[Passes], path: Path) -> None:
    """Writes the PNG atomically. One colour for each model and temperature; the band is the 95 % interval of pass@k."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for i, passes in enumerate(scored):
        colour = COLOURS[i % len(COLOURS)]
        label = f"{passes.model}, T {passes.temperature:g}"
        ks = range(1, len(passes.pass_at) + 1)
        panel.plot(ks, [e.mean for e in passes.pass_at], color=colour, marker="." if len(ks) < 2 else "", label=label)
        panel.fill_between(
            ks, [e.low for e in passes.pass_at], [e.high for e in passes.pass_at], color=colour, alpha=0.15, linewidth=0
        )
        for name, estimates in passes.selected.items():
            means = [e.mean for e in estimates]
            panel.plot(ks, means, STYLES[name], color=colour, linewidth=1.2, label=f"{label}: {name}")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("k  (replies per task)")
    panel.set_ylabel("share of tasks solved")
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png")
