"""A report as text for the terminal, as Markdown and as JSON; files are written whole or not at all."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_sfr.evaluation.bootstrap import Estimate
from megatron_sfr.evaluation.report import Report, verdict

INTERVALS = (
    "Intervals are 95 % bootstrap intervals over {n} prompts; they cover prompts and sampling, not training seeds."
)


@contextmanager
def whole(path: Path) -> Iterator[IO[str]]:
    """A text file that takes its name only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def terminal(report: Report) -> str:
    """The table for the terminal (mean ± half the interval), the losses, and what the comparison says."""
    names = _columns(report)
    heads = [name.rpartition(" ") for name in names]  # "coverage, far" takes two lines
    rows = [["", "", *(head[0] for head in heads)], ["model", "T", *(head[2] for head in heads)]]
    rows += _rows(report, _short)
    losses = _losses(report, _short)
    parts = [_aligned(rows), "± is half of the interval. " + INTERVALS.format(n=report.prompts), *report.notes]
    if losses:
        parts += ["", "Loss on real replies (nats a token, temperature 1)", _aligned(losses)]
    return "\n".join([*parts, "", *map(verdict, report.gaps)])


def markdown(report: Report, title: str, picture: str) -> str:
    """The same as a page, with full intervals."""
    names = _columns(report)
    lines = [f"# {title}", "", f"![frontiers]({picture})", ""]
    lines += [*(f"- {verdict(gap)}" for gap in report.gaps), ""]
    lines += _markdown_table([["model", "temperature", *names], *_rows(report, str)])
    lines += ["", INTERVALS.format(n=report.prompts), *report.notes]
    if losses := _losses(report, str):
        lines += ["", "Loss on real replies (nats a token, temperature 1):", "", *_markdown_table(losses)]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> str:
    """Everything, numbers in full; what has no value is null."""
    content = asdict(report) | {"verdicts": [verdict(gap) for gap in report.gaps]}
    return json.dumps(_without_nan(content), indent=1, ensure_ascii=False) + "\n"


def _columns(report: Report) -> list[str]:
    """Scores that have a value for some model."""
    every = next(iter(report.scores.values()))
    return [name for name in every if any(e.n for scores in report.scores.values() for e in scores[name])]


def _rows(report: Report, show: Any) -> Iterator[list[str]]:
    for model, scores in report.scores.items():
        for t, temperature in enumerate(report.temperatures):
            yield [model, f"{temperature:g}", *(show(scores[name][t]) for name in _columns(report))]


def _losses(report: Report, show: Any) -> list[list[str]]:
    names = list(next(iter(report.losses.values())))
    if not names:
        return []
    return [["model", *names], *([model, *map(show, sets.values())] for model, sets in report.losses.items())]


def _short(estimate: Estimate) -> str:
    if not estimate.n:
        return "-"
    mean, half = (f"{value:.3f}".removeprefix("0") for value in (estimate.mean, (estimate.high - estimate.low) / 2))
    return f"{mean}±{half}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
