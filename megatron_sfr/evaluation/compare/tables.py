"""A report as text for the terminal, as Markdown and as JSON."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_sfr.evaluation.compare.questions import shown_temperature
from megatron_sfr.evaluation.compare.report import REAL, Report, verdict
from megatron_sfr.evaluation.scores.bootstrap import NO_VALUE, Estimate
from megatron_sfr.evaluation.scores.metrics import METRICS, metric

MARKUP = re.compile(r"[\\`*_|~$]|\](?=[(\[])")  # of GitHub's Markdown, within a line
SIMILARITY = (
    "Similarity: mean cosine of two replies to the same prompt and persona, within a model on the diagonal, across "
    "models beside it. Models that say the same are as similar to each other as each is to itself."
)
INTERVALS = (
    "Intervals are 95 % bootstrap intervals over {n} prompts; they cover prompts and sampling, not training seeds."
)


def terminal(report: Report) -> str:
    """The table for the terminal (mean ± half the interval), the losses, and the verdicts."""
    names = [name for name in columns(report) if not metric(name).detail]
    heads = [name.rpartition(" ") for name in names]  # "coverage, far" takes two lines
    rows = [["", "", *(head[0] for head in heads)], ["model", "T", *(head[2] for head in heads)]]
    rows += score_rows(report, names, _short)
    parts = [_aligned(rows), "± is half of the interval. " + INTERVALS.format(n=report.prompts), *report.notes]
    for title, table in loss_tables(report, _short):
        parts += ["", title, _aligned(table)]
    return "\n".join([*parts, "", *map(verdict, report.gaps)])


def markdown(report: Report, title: str, picture: str) -> str:
    """The same as Markdown, with full intervals. picture: a file beside it, if the report has axes."""
    names = columns(report)
    lines = [f"# {escaped(title)}", ""]
    lines += [f"![frontiers]({picture})", ""] if report.axes else []
    lines += [*(f"- {escaped(verdict(gap))}" for gap in report.gaps), ""]
    lines += markdown_table([["model", "temperature", *heads(report, names)], *score_rows(report, names, str)])
    lines += ["", INTERVALS.format(n=report.prompts), *(f"\n{escaped(note)}" for note in report.notes)]
    for caption, table in loss_tables(report, str):
        lines += ["", f"{caption}:", "", *markdown_table(table)]
    for caption, table in similarity_tables(report):
        lines += ["", f"{caption}:", "", *markdown_table(table)]
    lines += ["", SIMILARITY] if report.similarity else []
    lines += ["", *(f"- {name}: {metric(name).meaning}{direction(name)}" for name in names)]
    return "\n".join(lines) + "\n"


def as_json(report: Report, record: Mapping[str, object]) -> str:
    """Everything at full precision; missing values are null. record: what made it, added to the report's keys."""
    content = asdict(report) | {"verdicts": [verdict(gap) for gap in report.gaps]} | dict(record)
    return json.dumps(_without_nan(content), indent=1, ensure_ascii=False) + "\n"


def columns(report: Report) -> list[str]:
    """Scores that have a value for some model; quality first, so that diversity is not read alone."""
    every = next(iter(report.scores.values()))
    known = [name for name in every if any(e.n for scores in report.scores.values() for e in scores[name])]
    place = {name: i for i, name in enumerate(METRICS)}
    return sorted(known, key=lambda name: (metric(name).kind == "diversity", place[name.partition(",")[0]]))


def heads(report: Report, names: Sequence[str]) -> list[str]:
    """Each score with n, the number of prompts that have a value."""
    counts = [{e.n for scores in report.scores.values() for e in scores[name]} for name in names]
    return [f"{name} (n={'–'.join(map(str, sorted({min(n), max(n)})))})" for name, n in zip(names, counts, strict=True)]


def score_rows(report: Report, names: Sequence[str], show: Any) -> Iterator[list[str]]:
    """Lines of model, temperature and scores; the line of the real replies first, if there is one.

    A temperature without replies of a model has no line.
    """
    if any(report.real[name].n for name in names if name in report.real):
        # Real replies have no scores of models alone, such as utility_k.
        yield ["real", "-", *(show(report.real.get(name, NO_VALUE)) for name in names)]
    for model, scores in report.scores.items():
        for t, temperature in enumerate(report.temperatures):
            if any(estimates[t].n for estimates in scores.values()):
                yield [model, shown_temperature(temperature), *(show(scores[name][t]) for name in names)]


def loss_tables(report: Report, show: Any) -> Iterator[tuple[str, list[list[str]]]]:
    """(title, table) of the losses by set of replies, and of the perplexities by persona."""
    for title, found in (  # no losses if only replies were given
        ("Loss on real replies (nats per token, temperature 1)", report.losses),
        ("Perplexity of each persona's real replies", report.perplexities),
    ):
        if names := list(next(iter(found.values()))):
            rows = [[model, *map(show, values.values())] for model, values in found.items()]
            yield title, [["model", *(name or "no persona" for name in names)], *rows]


def similarity_tables(report: Report) -> Iterator[tuple[str, list[list[str]]]]:
    """(title, table) of the similarities at each temperature that two models have; within a model on the diagonal."""
    for temperature in dict.fromkeys(pair.temperature for pair in report.similarity):
        found = {(p.model, p.other): str(p.estimate) for p in report.similarity if p.temperature == temperature}
        models = list(dict.fromkeys(model for model, _ in found))
        if len(models) > 1:
            names = [*models, *([REAL] if any(e != "-" for (_, other), e in found.items() if other == REAL) else [])]
            rows = [[m, *(found.get((m, n)) or found.get((n, m), "-") for n in names)] for m in models]
            yield f"Similarity of replies, temperature {shown_temperature(temperature)}", [["model", *names], *rows]


def direction(name: str) -> str:
    """A note for scores of which less is better, or one value is right."""
    if (right := metric(name).right) is not None:
        return f" ({right:g}: as diverse as the real replies; more: collapsed; less: over-dispersed)"
    if not metric(name).lower:
        return ""
    return " (lower is more diverse)" if metric(name).kind == "diversity" else " (lower is better)"


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


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first line is the header; bars and line breaks in cells are escaped."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return [head, "|" + "---|" * len(rows[0]), *body]


def escaped(text: str) -> str:
    """Text from data as one line of Markdown that renders literally: without markup, HTML, links or cell ends."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
