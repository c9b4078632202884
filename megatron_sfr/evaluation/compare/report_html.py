"""The report as one HTML page: what moved beyond noise and what did not, the plot, all tables, and samples."""

from collections.abc import Sequence

from megatron_sfr.evaluation.compare.questions import Answered, shown_temperature
from megatron_sfr.evaluation.compare.report import Report, verdict
from megatron_sfr.evaluation.compare.tables import INTERVALS, columns, direction, heads, loss_tables, score_rows
from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.scores.metrics import metric
from megatron_sfr.html import bullets, document, heading, image, note, table

PROMPTS, PERSONAS = 3, 3  # in the samples
Samples = list[list[str]]
Temperatures = Sequence[float | None]


def page(report: Report, title: str, picture: bytes | None, samples: Samples) -> str:
    """The page. picture: a PNG of the frontiers, if the report has axes. samples: a table from `side_by_side`."""
    moved = [verdict(gap) for gap in report.gaps if gap.is_beyond_noise]
    still = [verdict(gap) for gap in report.gaps if not gap.is_beyond_noise]
    names = columns(report)
    parts = []
    for text, verdicts in (("What moved beyond noise", moved), ("What did not", still)):
        parts += [heading(text), bullets(verdicts) if verdicts else note("Nothing.")]
    if picture:
        parts += [heading("Frontiers"), image(picture, "diversity against quality, one curve per model")]
    parts += [note("A model is its whole curve over temperatures: one that lies above and to the right is better.")]
    rows = [["model", "temperature", *heads(report, names)], *score_rows(report, names, str)]
    parts += [heading("Scores"), table(rows), note(INTERVALS.format(n=report.prompts)), *map(note, report.notes)]
    for caption, losses in loss_tables(report, str):
        parts += [heading(caption), table(losses)]
    parts += [heading("Samples"), table(samples), note("The first sample of each; they were not chosen.")]
    meanings = [[name, metric(name).kind, metric(name).meaning + direction(name)] for name in names]
    parts += [heading("What the scores mean"), table([["score", "kind", "meaning"], *meanings])]
    return document(title, parts)


def side_by_side(asked: Sequence[Asked], answered: Sequence[Answered], temperatures: Temperatures) -> Samples:
    """A table of each model's first reply at each temperature, for a few prompts and personas, and a real reply."""
    shared = list(dict.fromkeys(entry.prompt.shared for entry in asked))
    count = min(PROMPTS, len(shared))
    rows = [["question", "persona", "temperature", *(answers.model for answers in answered), "real"]]
    for prompt in (shared[i * len(shared) // count] for i in range(count)):
        chosen = [i for i, entry in enumerate(asked) if entry.prompt.shared == prompt][:PERSONAS]
        for i in chosen:
            real = next(iter(asked[i].texts), "")
            for temperature in temperatures:
                texts = [_first(answers, temperature, i) for answers in answered]
                if any(text is not None for text in texts):
                    place = [asked[i].prompt.question, asked[i].prompt.persona or ""]
                    rows.append([*place, shown_temperature(temperature), *(text or "" for text in texts), real])
    return rows


def _first(answers: Answered, temperature: float | None, i: int) -> str | None:
    """The first reply to an entry at a temperature, if there is one."""
    if temperature not in answers.temperatures:
        return None
    return next(iter(answers.replies[answers.temperatures.index(temperature)][i]), None)
