"""A complete evaluation of models: prints a table and writes the report's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.plot import draw
from megatron_sfr.evaluation.compare.questions import Answered
from megatron_sfr.evaluation.compare.report import Axes, Report, similarities, summarize
from megatron_sfr.evaluation.compare.report_html import explore, page
from megatron_sfr.evaluation.compare.tables import as_json, markdown, terminal
from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.judge.judge_replies import Judge, Judged
from megatron_sfr.evaluation.scores.style import Styled, StyleJudge
from megatron_sfr.storage.atomic import replacing


def write_report(
    answered: Sequence[Answered],
    scorer: Scorer,
    axes: Sequence[Axes],
    output: Path,
    *,
    title: str,
    picture: str,
    drawn: str,
    samples: str | None = None,
    judge: Judge | None,
    identity: Mapping[str, object] | None,
    show: bool,
) -> Report:
    """Scores every model's replies, of which the first model is the baseline. Writes the files.

    picture: the name of the plot, which is written if there are axes.
    drawn: how many replies there are and where they come from, for the notes.
    samples: the name of a file in `output` that holds the replies and belongs to the report.
    judge: rates the replies; its votes are kept in votes.jsonl.
    identity: everything that determines the numbers, stored in evaluation.json, which is written last.
    show: whether to print the table.
    """
    judged = _judged(judge, scorer, answered, output)
    curves = [scorer.curve(model, judged.models.get(model.model)) for model in answered]
    real = scorer.real() | {name: scorer.by_prompt(ratings) for name, ratings in judged.real.items()}
    notes = [*scorer.notes(drawn), *judged.notes]
    personas = [entry.prompt.persona or "" for entry in scorer.asked]
    report = summarize(curves, axes, notes, real, similarities(curves, scorer), personas)
    plot = None
    if axes:
        draw(report, output / picture, title)
        plot = (output / picture).read_bytes()
    explorer = explore(scorer, answered, curves, report.temperatures)
    pages = {
        "report.md": markdown(report, title, picture),
        "report.html": page(report, title, plot, explorer),
    }
    for name, text in pages.items():
        with replacing(output / name) as file:
            file.write(text)
    names = [*([samples] if samples else []), *([picture] if axes else []), *pages]
    sizes = {name: (output / name).stat().st_size for name in names}
    with replacing(output / "evaluation.json") as file:
        file.write(as_json(report, {"identity": identity, "files": sizes} if identity else {}))
    if show:
        print(terminal(report), flush=True)
    return report


def _judged(judge: Judge | None, scorer: Scorer, answered: Sequence[Answered], output: Path) -> Judged:
    """The ratings of the replies whose embeddings are scored too; empty without a judge."""
    if judge is None:
        return Judged({}, {}, ())
    options = scorer.options
    replies = {model.model: model.replies for model in answered}
    return judge.rate(scorer.asked, replies, output, each=options.embedded, prompts=options.embedded_prompts)


def axes_of(judge: StyleJudge | None, *, embeds: bool = True) -> list[Axes]:
    """The frontiers of models that are compared with real replies. embeds: whether there is an encoder."""
    axes = [Axes("relevance", "self-BLEU-4"), Axes("relevance", "modes")] if embeds else []
    return axes + ([Axes("style fidelity", "CS-SB-1")] if judge else [])


def style_judge(asked: Sequence[Asked]) -> StyleJudge | None:
    """A judge trained on the replies of the data; None if they have only one persona or one prompt."""
    rows = [Styled(entry.prompt.shared, entry.prompt.persona or "", text) for entry in asked for text in entry.texts]
    if len({row.persona for row in rows}) < 2 or len({row.shared for row in rows}) < 2:
        return None
    return StyleJudge(rows)
