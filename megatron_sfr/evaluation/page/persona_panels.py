"""Small multiples: one frontier per persona as inline SVG, with the same axes in all panels, and the numbers below."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.html import download, folded, note, table
from megatron_sfr.storage.user_files import cut

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 240, 180, 38, 10, 8, 24
COLOURS = ("#4c566a", "#d1495b", "#2e86ab", "#8f6bb3", "#3a7d44", "#c98a1b", "#13a89e", "#8c4a2f")
DARK = ("#b8c0d0", "#f0808a", "#6db9e8", "#c0a2e4", "#79c584", "#e8b756", "#55d6ca", "#d69a78")
"""The same colours on a dark page."""
SHAPES = (  # around the origin
    "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
    "M-2.8,-2.8h5.6v5.6h-5.6z",
    "M0,-3.6L3.4,2.6H-3.4z",
    "M0,-3.8L3.8,0L0,3.8L-3.8,0z",
    "M0,3.6L3.4,-2.6H-3.4z",
    "M-1.2,-3.4h2.4v2.2h2.2v2.4h-2.2v2.2h-2.4v-2.2h-2.2v-2.4h2.2z",
    "M-3.2,-1.8L-1.8,-3.2L0,-1.4L1.8,-3.2L3.2,-1.8L1.4,0L3.2,1.8L1.8,3.2L0,1.4L-1.8,3.2L-3.2,1.8L-1.4,0z",
    "M0,-4L1,-1.3L3.9,-1.3L1.6,.6L2.4,3.4L0,1.7L-2.4,3.4L-1.6,.6L-3.9,-1.3L-1,-1.3z",
)
_LIGHT_COLOURS, _DARK_COLOURS = ("; ".join(f"--c{i}: {c}" for i, c in enumerate(row)) for row in (COLOURS, DARK))
STYLE = f"""
:root {{ {_LIGHT_COLOURS} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK_COLOURS} }} }}
{" ".join(f".c{i} {{ color: var(--c{i}) }}" for i in range(len(COLOURS)))}
.panels {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(50% - .4rem, 15rem), 1fr)) }}
.panels figure {{ margin: 0; break-inside: avoid }} .panels svg {{ width: 100%; display: block }}
.panels figcaption {{ font-size: 13px; overflow-wrap: anywhere }}
.panels text {{ font: 11px system-ui, sans-serif; fill: var(--quiet) }} .panels .grid {{ stroke: var(--line) }}
.panels .curve {{ fill: none; stroke: currentColor; stroke-width: 1.6 }} .mark {{ fill: currentColor }}
.panels .interval {{ stroke: currentColor; stroke-width: .9; opacity: .5 }}
.panels .first {{ fill: var(--page); stroke: currentColor; stroke-width: 1.3 }}
.legend span {{ margin-right: 1.1rem; white-space: nowrap }} .legend svg {{ width: 11px; height: 11px }}
"""


@dataclass(frozen=True)
class Point:
    """A model at a temperature."""

    temperature: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Panels:
    """One panel per persona."""

    across: str
    up: str
    personas: Mapping[str, Mapping[str, Sequence[Point]]]
    """By persona and model, with the lowest temperature first."""
    about: str
    """How to read them."""
    positions: Sequence[str] = ()
    """The labels of x = 0, 1, ... where x counts temperatures instead of measuring quality."""


@dataclass(frozen=True)
class Axis:
    """The range of values in all panels, and where their lines are."""

    low: float
    high: float
    ticks: Sequence[float]
    labels: Sequence[str]


def section(panels: Panels) -> list[str]:
    """The panels as HTML, with a legend, all numbers as a folded table, and a link to the CSV file."""
    points = [point for models in panels.personas.values() for row in models.values() for point in row]
    x = axis([value for p in points for value in (p.x.low, p.x.high)])
    if count := len(panels.positions):
        x = Axis(-0.5, count - 0.5, range(count), panels.positions)
    y = axis([value for p in points for value in (p.y.low, p.y.high)])
    rows = list(_rows(panels))
    models = list(next(iter(panels.personas.values())))
    return [
        note(panels.about),
        f'<p class="legend">{" ".join(_key(i, model) for i, model in enumerate(models))}</p>',
        f'<div class="panels">{"".join(_panel(name, row, x, y) for name, row in panels.personas.items())}</div>',
        folded("the same as a table", table(rows)),
        download("personas.csv", rows),
    ]


def axis(values: Sequence[float]) -> Axis:
    """A range that holds the values with some room, and two to six round values in it.

    Values that differ by less than a billionth count as equal: labels could not tell them apart.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    differ = high - low > 1e-9 * max(1.0, abs(low), abs(high))
    room = 0.05 * (high - low) if differ else 0.05
    low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2) if (high - low) / (s * power) <= 5)
    digits = next(n for n in range(20) if math.isclose(round(step, n), step))
    multiples = (k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1))
    ticks = [min(max(tick, low), high) for tick in multiples]  # rounding may put one outside
    return Axis(low, high, ticks, [f"{tick + 0.0:.{digits}f}" for tick in ticks])


def _panel(persona: str, models: Mapping[str, Sequence[Point]], x_axis: Axis, y_axis: Axis) -> str:
    def x(value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (value - x_axis.low) / (x_axis.high - x_axis.low):.1f}"

    def y(value: float) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (y_axis.high - value) / (y_axis.high - y_axis.low):.1f}"

    parts = []
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        parts.append(f'<path class="grid" d="M{x(tick)},{TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>')
    for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        parts.append(f'<path class="grid" d="M{LEFT},{y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick)}" dy="4" text-anchor="end">{escape(label)}</text>')
    for i, (model, points) in enumerate(models.items()):
        line = " ".join(f"{x(p.x.mean)},{y(p.y.mean)}" for p in points)
        crosses = "".join(
            f"M{x(p.x.low)},{y(p.y.mean)}H{x(p.x.high)}M{x(p.x.mean)},{y(p.y.low)}V{y(p.y.high)}" for p in points
        )
        marks = "".join(
            f'<path class="{"mark" if k else "first"}" transform="translate({x(p.x.mean)} {y(p.y.mean)})" '
            f'd="{SHAPES[i % len(SHAPES)]}"><title>{escape(_words(model, p))}</title></path>'
            for k, p in enumerate(points)
        )
        curve = f'<path class="interval" d="{crosses}"/><polyline class="curve" points="{line}"/>' if points else ""
        parts.append(f'<g class="c{i % len(COLOURS)}">{curve}{marks}</g>')
    name = cut(persona, 80) or "no persona"
    prompts = max((p.y.n for points in models.values() for p in points), default=0)
    caption = f'{escape(name)} <span class="note">{prompts:,} prompts</span>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}: the numbers are in the table">'
    return f"<figure><figcaption>{caption}</figcaption>{svg}{''.join(parts)}</svg></figure>"


def _words(model: str, point: Point) -> str:
    return f"{model}, temperature {point.temperature}: {point.x} across, {point.y} up"


def _key(i: int, model: str) -> str:
    shape = f'<path class="mark" d="{SHAPES[i % len(SHAPES)]}"/>'
    icon = f'<svg class="c{i % len(COLOURS)}" viewBox="-4 -4 8 8" aria-hidden="true">{shape}</svg>'
    return f"<span>{icon} {escape(model)}</span>"


def _rows(panels: Panels) -> Iterator[list[str]]:
    """Each score is followed by its number of prompts."""
    measured = not panels.positions
    yield ["persona", "model", "temperature", *([panels.across, "prompts"] if measured else []), panels.up, "prompts"]
    for persona, models in panels.personas.items():
        for model, points in models.items():
            for p in points:
                across = [str(p.x), str(p.x.n)] if measured else []
                yield [persona, model, p.temperature, *across, str(p.y), str(p.y.n)]
