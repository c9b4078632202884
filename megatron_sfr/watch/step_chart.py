"""A score over steps as a small SVG for the page: a line, its intervals, and the value of the real replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 260, 130, 38, 8, 20
STYLE = """
:root { --mark: #1f6fb2; --band: #1f6fb233; --real: #b3591f }
@media (prefers-color-scheme: dark) { :root { --mark: #6db3f2; --band: #6db3f233; --real: #f0a267 } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-size: 13px } svg { width: 100%; max-width: 26rem }
svg text { font: 10px system-ui, sans-serif; fill: var(--quiet) } svg .axis { stroke: var(--line) }
svg .score { stroke: var(--mark); fill: none; stroke-width: 1.8 } svg .point { fill: var(--mark) }
svg .band { fill: var(--band) } svg .real { stroke: var(--real); stroke-dasharray: 4 3 }
"""


@dataclass(frozen=True)
class Series:
    """One score."""

    name: str
    note: str
    """How to read it, such as "lower is more diverse"."""
    steps: Sequence[int]
    means: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    real: float | None = None
    """The score of the real replies."""


def chart(series: Series) -> str:
    """An HTML figure. Its text alternative gives the first and the last value."""
    values = [*series.means, *(x for interval in series.intervals for x in interval)]
    if series.real is not None:
        values.append(series.real)
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    first, last = series.steps[0], series.steps[-1]

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - 6) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def points(pairs: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in pairs)

    lows, highs = ([(step, pair[i]) for step, pair in zip(series.steps, series.intervals, strict=True)] for i in (0, 1))
    line = list(zip(series.steps, series.means, strict=True))
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 6}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>' for v in (low, high)]
    parts += [f'<text x="{LEFT - 4}" y="{y(v) + 3:.1f}" text-anchor="end">{short(v)}</text>' for v in (low, high)]
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    parts += [f'<text x="{x(s):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{s:,}</text>' for s, anchor in ends]
    parts.append(f'<polygon class="band" points="{points([*highs, *reversed(lows)])}"/>')
    if series.real is not None:
        at = f'y1="{y(series.real):.1f}" y2="{y(series.real):.1f}"'
        parts.append(f'<line class="real" x1="{LEFT}" x2="{WIDTH - 6}" {at}/>')
    parts.append(f'<polyline class="score" points="{points(line)}"/>')
    parts += [f'<circle class="point" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.2"/>' for s, v in line]
    words = f"{series.name}: {series.means[0]:.3f} at step {first:,}, {series.means[-1]:.3f} at step {last:,}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
    note = f' <span class="note">{escape(series.note)}</span>' if series.note else ""
    return f"<figure><figcaption>{escape(series.name)}{note}</figcaption>{svg}</figure>"


def short(value: float) -> str:
    """Three digits, or more before the point; never -0.00."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:.{digits}f}"


def charts(found: Sequence[Series]) -> str:
    """Several charts side by side."""
    return f'<div class="charts">{"".join(map(chart, found))}</div>'
