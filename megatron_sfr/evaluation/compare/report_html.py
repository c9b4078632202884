"""The report as one HTML page: what moved beyond noise and what did not, the plot, all tables, and the replies."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sfr.evaluation.compare.questions import Answered, shown_temperature
from megatron_sfr.evaluation.compare.report import Report, verdict
from megatron_sfr.evaluation.compare.tables import (
    INTERVALS,
    SIMILARITY,
    columns,
    direction,
    heads,
    loss_tables,
    score_rows,
    similarity_tables,
)
from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.scores.metrics import metric
from megatron_sfr.html import bullets, document, download, folded, heading, image, note, table

PROMPTS, PERSONAS = 24, 12  # whose replies are on the page
Temperatures = Sequence[float | None]
FILTER = """<input type="search" id="filter" placeholder="show prompts and replies with these words" hidden>
<script>
const field = document.getElementById("filter"), words = () => field.value.toLowerCase().split(/\\s+/).filter(Boolean);
field.hidden = false;
field.addEventListener("input", () => {
  for (const prompt of document.querySelectorAll("details")) {
    let any = false;
    for (const row of [...prompt.querySelectorAll("tr")].slice(1)) {
      const text = (prompt.firstChild.textContent + " " + row.textContent).toLowerCase();
      row.hidden = !words().every(word => text.includes(word));
      any ||= !row.hidden;
    }
    prompt.hidden = !any;
    prompt.open = any && words().length > 0;
  }
});
</script>"""
"""A field that filters the replies; without scripts it is not shown and everything can be read."""


@dataclass(frozen=True)
class Samples:
    """A prompt and a table of the models' replies to it: persona, temperature, one column per model, a real reply."""

    question: str
    rows: list[list[str]]


def page(report: Report, title: str, picture: bytes | None, samples: Sequence[Samples]) -> str:
    """The page. picture: a PNG of the frontiers, if the report has axes. samples: of `side_by_side`."""
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
    parts += [heading("Scores"), table(rows), download("scores.csv", rows)]
    parts += [note(INTERVALS.format(n=report.prompts)), *map(note, report.notes)]
    for caption, losses in loss_tables(report, str):
        parts += [heading(caption), table(losses)]
    for caption, rows in similarity_tables(report):
        parts += [heading(caption), table(rows)]
    parts += [note(SIMILARITY)] if report.similarity else []
    parts += [heading("Replies"), note("The first sample of each; they were not chosen."), FILTER]
    parts += [folded(sample.question, table(sample.rows)) for sample in samples]
    meanings = [[name, metric(name).kind, metric(name).meaning + direction(name)] for name in names]
    parts += [heading("What the scores mean"), table([["score", "kind", "meaning"], *meanings])]
    return document(title, parts)


def side_by_side(asked: Sequence[Asked], answered: Sequence[Answered], temperatures: Temperatures) -> list[Samples]:
    """Each model's first reply at each temperature, for evenly spaced prompts and their first personas."""
    shared = list(dict.fromkeys(entry.prompt.shared for entry in asked))
    count = min(PROMPTS, len(shared))
    found = []
    for prompt in (shared[i * len(shared) // count] for i in range(count)):
        chosen = [i for i, entry in enumerate(asked) if entry.prompt.shared == prompt][:PERSONAS]
        rows = [["persona", "temperature", *(answers.model for answers in answered), "real"]]
        for i in chosen:
            real = next(iter(asked[i].texts), "")
            for temperature in temperatures:
                texts = [_first(answers, temperature, i) for answers in answered]
                if any(text is not None for text in texts):
                    place = [asked[i].prompt.persona or "", shown_temperature(temperature)]
                    rows.append([*place, *(text or "" for text in texts), real])
        found.append(Samples(asked[chosen[0]].prompt.question, rows))
    return found


def _first(answers: Answered, temperature: float | None, i: int) -> str | None:
    """The first reply to an entry at a temperature, if there is one."""
    if temperature not in answers.temperatures:
        return None
    return next(iter(answers.replies[answers.temperatures.index(temperature)][i]), None)
