"""The report as one HTML page: what moved beyond noise and what did not, the plot, all tables, and the replies."""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_sfr.evaluation.compare.curves import Curve, Scorer
from megatron_sfr.evaluation.compare.questions import Answered, shown_temperature
from megatron_sfr.evaluation.compare.report import PersonaFrontiers, Report, verdict
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
from megatron_sfr.evaluation.generate.prompts import evenly_spaced
from megatron_sfr.evaluation.page import persona_panels, reply_explorer
from megatron_sfr.evaluation.page.nearest_reply import MOST, RealReplies
from megatron_sfr.evaluation.page.persona_panels import Panels, Point
from megatron_sfr.evaluation.page.reply_explorer import CHARACTERS, PERSONAS, PROMPTS, Explorer, ShownReply
from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.evaluation.scores.metrics import metric
from megatron_sfr.html import bullets, document, download, heading, image, note, table, wide


def page(report: Report, title: str, picture: bytes | None, explorer: Explorer) -> str:
    """The page. picture: a PNG of the frontiers, if the report has axes. explorer: of `explore`."""
    moved = [verdict(gap) for gap in report.gaps if gap.is_beyond_noise]
    still = [verdict(gap) for gap in report.gaps if not gap.is_beyond_noise]
    names = columns(report)
    parts = []
    for text, verdicts in (("What moved beyond noise", moved), ("What did not", still)):
        parts += [heading(text), bullets(verdicts) if verdicts else note("Nothing.")]
    if picture:
        parts += [heading("Frontiers"), wide(image(picture, "diversity against quality, one curve per model"))]
        parts += [note("A model is its whole curve over temperatures: one that lies above and to the right is better.")]
    if report.personas:
        parts += [heading("By persona"), *persona_panels.section(_panels(report.personas, report.temperatures))]
    rows = [["model", "temperature", *heads(report, names)], *score_rows(report, names, str)]
    parts += [heading("Scores"), table(rows), download("scores.csv", rows)]
    parts += [note(INTERVALS.format(n=report.prompts)), *map(note, report.notes)]
    for caption, losses in loss_tables(report, str):
        parts += [heading(caption), table(losses)]
    for caption, rows in similarity_tables(report):
        parts += [heading(caption), table(rows)]
    parts += [note(SIMILARITY)] if report.similarity else []
    parts += [heading("Replies"), *reply_explorer.section(explorer)]
    meanings = [[name, metric(name).kind, metric(name).meaning + direction(name)] for name in names]
    parts += [heading("What the scores mean"), table([["score", "kind", "meaning"], *meanings])]
    return document(title, parts, persona_panels.STYLE + reply_explorer.STYLE)


def _panels(found: PersonaFrontiers, temperatures: Sequence[float | None]) -> Panels:
    """The frontiers by persona; diversity over temperature where no score of quality has a value."""
    axes, shown = found.axes, [shown_temperature(temperature) for temperature in temperatures]

    def points(row: Sequence[tuple[Estimate, Estimate]]) -> Iterator[Point]:
        for i, (quality, diversity) in enumerate(row):
            across = quality if found.has_quality else Estimate(i, i, i, 1)
            if across.n and diversity.n:
                yield Point(shown[i], across, axes.turned(diversity))

    about = f"Across: {axes.quality + ' (better →)' if found.has_quality else 'temperature'}. Up: {axes.label} "
    about += "(more diverse ↑). All panels have the same axes. The open mark is a curve's lowest temperature; crosses "
    about += "are 95 % intervals over the persona's prompts."
    about += "" if found.has_quality else " No score of quality has a value for single personas, and noise is diverse."
    if found.left_out:
        about += f" {found.left_out:,} personas with fewer prompts are not shown."
    personas = {
        persona: {model: list(points(row)) for model, row in models.items()}
        for persona, models in found.estimates.items()
    }
    return Panels(axes.quality, axes.label, personas, about, () if found.has_quality else shown)


def explore(
    scorer: Scorer, answered: Sequence[Answered], curves: Sequence[Curve], temperatures: Sequence[float | None]
) -> Explorer:
    """Each model's first reply at each temperature, for evenly spaced prompts and their first personas.

    The prompts are among those that the scores embed: nothing is embedded for the page. curves: of the same models.
    """
    prompts, most = [], 0
    for shared in evenly_spaced(scorer.embedded_prompts, PROMPTS):
        entries = [i for i, entry in enumerate(scorer.asked) if entry.prompt.shared == shared]
        spoken = [(scorer.asked[i].prompt.persona or "", text) for i in entries for text in scorer.asked[i].texts]
        vectors = None if scorer.encoder is None else np.concatenate([scorer.references[i] for i in entries])
        real = RealReplies(spoken, scorer.tokenizer, vectors)
        rows = (_replies(scorer, i, real, answered, curves, temperatures) for i in entries[:PERSONAS])
        shown = [reply for replies in rows for reply in replies]
        prompts.append((scorer.asked[entries[0]].prompt.question, shown))
        most = max(most, real.known)
    return Explorer(prompts, _about(len(prompts), scorer, most))


def _replies(
    scorer: Scorer,
    i: int,
    real: RealReplies,
    answered: Sequence[Answered],
    curves: Sequence[Curve],
    temperatures: Sequence[float | None],
) -> Iterator[ShownReply]:
    """The models' replies to entry i at each temperature, then its first real reply."""
    persona = scorer.asked[i].prompt.persona or ""
    for temperature in temperatures:
        for answers, curve in zip(answered, curves, strict=True):
            if temperature not in answers.temperatures:
                continue
            t = answers.temperatures.index(temperature)
            if texts := answers.replies[t][i]:
                near = real.nearest(texts[0], None if scorer.encoder is None else curve.vectors[t][i][0])
                beside = (*real.spoken[near.index], near.similarity) if near else ()
                yield ShownReply(persona, shown_temperature(temperature), answers.model, texts[0], *beside)
    if texts := scorer.asked[i].texts:
        yield ShownReply(persona, "-", "real", texts[0])


def _about(shown: int, scorer: Scorer, most: int) -> str:
    """How the replies were chosen and compared. most: real replies to one prompt."""
    text = "The first sample of each model at each temperature; none was selected. "
    text += f"{shown} of {len(scorer.prompts)} prompts, evenly spaced. "
    if most:
        text += "Beside it is the nearest real reply to the same prompt, by any persona: "
        text += f"by cosine of {scorer.encoder}. " if scorer.encoder else "nothing is embedded, so by words in common, "
        text += "" if scorer.encoder else "2 |a ∩ b| / (|a| + |b|). "
        text += f"At most {MOST} real replies to a prompt are compared, evenly spaced. " if most > MOST else ""
    else:
        text += "There are no real replies to compare with; --data gives them. "
    return f"{text}At most {PERSONAS} personas of a prompt, and {CHARACTERS:,} characters of a reply."
