"""The report as one HTML page: what moved beyond noise and what did not, the plot, all tables, and samples."""

from collections.abc import Sequence

from megatron_sfr.evaluation.compare.replies import Answers
from megatron_sfr.evaluation.compare.report import Report, verdict
from megatron_sfr.evaluation.compare.tables import INTERVALS, columns, direction, heads, loss_tables, score_rows
from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.scores.metrics import metric
from megatron_sfr.html import bullets, document, heading, image, note, table

PROMPTS, PERSONAS = 3, 3  # in the samples
Samples = list[list[str]]


def page(report: Report, title: str, picture: bytes, samples: Samples) -> str:
    """The page. picture: a PNG. samples: a table from `side_by_side`."""
    moved = [verdict(gap) for gap in report.gaps if gap.is_beyond_noise]
    still = [verdict(gap) for gap in report.gaps if not gap.is_beyond_noise]
    names = columns(report)
    parts = []
    for text, verdicts in (("What moved beyond noise", moved), ("What did not", still)):
        parts += [heading(text), bullets(verdicts) if verdicts else note("Nothing.")]
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


def side_by_side(asked: Sequence[Asked], answered: Sequence[Answers], temperatures: Sequence[float]) -> Samples:
    """A table of each model's first reply at each temperature, for a few prompts and personas, and a real reply."""
    shared = list(dict.fromkeys(entry.prompt.shared for entry in asked))
    count = min(PROMPTS, len(shared))
    rows = [["question", "persona", "temperature", *(answers.model for answers in answered), "real"]]
    for prompt in (shared[i * len(shared) // count] for i in range(count)):
        chosen = [i for i, entry in enumerate(asked) if entry.prompt.shared == prompt][:PERSONAS]
        for i in chosen:
            real = next(iter(asked[i].texts), "")
            for t, temperature in enumerate(temperatures):
                texts = [answers.replies[t][i][0].text for answers in answered]
                place = [asked[i].prompt.question, asked[i].prompt.persona or ""]
                rows.append([*place, f"{temperature:g}", *texts, real])
    return rows
