"""The study as one page, HTML and Markdown: what moved beyond noise, what did not, tables, picture, samples, costs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from examples.dictionary_styles.study import cost
from examples.dictionary_styles.study.choice import Table
from examples.dictionary_styles.study.controls import Controlled
from examples.dictionary_styles.study.plan import AXES, BASELINE, Plan, Settings, judged
from examples.dictionary_styles.study.verdicts import NO_EFFECT, Verdict
from examples.dictionary_styles.study.work import JUDGING, Place, rows, scorer
from megatron_sfr.evaluation.compare.curves import Curve, Loss
from megatron_sfr.evaluation.compare.plot import draw
from megatron_sfr.evaluation.compare.report import Report, summarize
from megatron_sfr.evaluation.compare.tables import columns, heads, markdown_table, score_rows
from megatron_sfr.html import bullets, document, heading, image, note, table
from megatron_sfr.storage.atomic import replacing

TITLE = "Dictionary styles: objectives from one start"
SAMPLE_PROMPTS = 6
Rows = list[list[str]]


@dataclass(frozen=True)
class Found:
    """All that the study found. curves: one a seed for each arm; repeated: verdicts on other replies of what moved."""

    plan: Plan
    settings: dict[str, Settings]
    tried: Table
    curves: dict[str, list[Curve]]
    verdicts: list[Verdict]
    repeated: list[Verdict]
    costs: cost.Costs
    controls: list[Controlled] = field(default_factory=list)

    @property
    def moved(self) -> list[Verdict]:
        """What moved in both samplings, to the same side: only this is called an effect."""
        again = {(v.arm, v.axes, v.judged) for v in self.repeated if v.moved}
        return [v for v in self.verdicts if v.moved and (v.arm, v.axes, v.judged) in again]


def summary(found: Found) -> str:
    return "\n".join(f"- {text}" for text in (*said(found, moved=True), *said(found, moved=False)))


def said(found: Found, *, moved: bool) -> list[str]:
    """One sentence per verdict. A difference that a second sampling does not confirm counts as not moved."""
    chosen = [v for v in found.verdicts if (v in found.moved) == moved]
    return [v.sentence + (" Not so in a second sampling." if v.moved and not moved else "") for v in chosen]


def write(found: Found, place: Place) -> None:
    """Writes study.html, study.md, study.png and study.json."""
    judge = scorer(JUDGING, found.plan.temperatures, found.plan, place)
    mean = [average(arm, curves, found.plan.temperatures) for arm, curves in found.curves.items()]
    report = summarize(mean, AXES, judge.notes(), judge.real())
    picture = place.study / "study.png"
    draw(report, picture, TITLE)
    sections = [
        ("What moved beyond noise", bullet(said(found, moved=True)), "text"),
        ("Every comparison with the baseline", comparisons(found), "table"),
        ("Against the baseline stopped earlier", controlled(found), "table"),
        ("The arms", arms(found), "table"),
        ("Settings that were tried", tried(found), "table"),
        ("Cost of a step", cost.table(found.costs) if found.costs else [], "table"),
        ("Scores, mean over seeds", scores(report), "table"),
        ("Samples, the first of each", samples(found, place), "table"),
    ]
    html = [note(how(found.plan, place)), heading("Frontiers"), image(picture.read_bytes(), "a curve an arm")]
    text = [f"# {TITLE}", "", how(found.plan, place), "", f"![frontiers]({picture.name})"]
    for title, content, kind in sections:
        if not content:
            continue
        html += [heading(title), bullets(content) if kind == "text" else table(content)]
        text += ["", f"## {title}", "", *([f"- {c}" for c in content] if kind == "text" else markdown_table(content))]
    html += list(map(note, report.notes))
    text += ["", *report.notes]
    for name, whole_text in (("study.html", document(TITLE, html)), ("study.md", "\n".join(text) + "\n")):
        write_text(place.study / name, whole_text)
    content = {"plan": asdict(found.plan), "settings": found.settings, "costs": found.costs}
    content |= {"verdicts": [asdict(v) | {"moved": v.moved} for v in (*found.verdicts, *found.repeated)]}
    content |= {"controls": [asdict(control) for control in found.controls]}
    write_text(place.study / "study.json", json.dumps(content, indent=1))


def how(plan: Plan, place: Place) -> str:
    both, more = (", ".join(f"{t:g}" for t in found) for found in (plan.temperatures, plan.between))
    return (
        f"Regime {plan.regime.name}: at most {plan.regime.per_persona} replies per persona. "
        f"{len(plan.arms)} arms, {len(plan.seeds)} seeds each, {plan.steps} steps from {place.base.name} in one order "
        f"of data; {plan.samples} replies per prompt at temperatures {both} with common random numbers, baseline at "
        f"{more} too. An arm is judged by its whole curve against the baseline's. It is said to differ if the 95 % "
        "interval over seeds and headwords leaves 0 out, every seed agrees, two seeds of the baseline lie nearer "
        "together, and all of it holds again in a second sampling. That is "
        f"{len(AXES) * (len(plan.arms) - 1)} comparisons: one of twenty would leave 0 out by chance."
    )


def bullet(texts: list[str]) -> list[str]:
    return texts or ["Nothing."]


def average(arm: str, curves: list[Curve], temperatures: tuple[float, ...]) -> Curve:
    """The mean curve of an arm's seeds at some of its temperatures."""

    def mean(losses: list[Loss]) -> Loss:
        return Loss(*(np.mean([getattr(loss, part) for loss in losses], axis=0) for part in ("nll", "tokens")))

    first = curves[0]
    at = [first.temperatures.index(t) for t in temperatures]
    return Curve(
        arm,
        temperatures,
        {name: np.mean([curve.scores[name][at] for curve in curves], axis=0) for name in first.scores},
        {name: mean([curve.losses[name] for curve in curves]) for name in first.losses},
        {name: mean([curve.personas[name] for curve in curves]) for name in first.personas},
    )


def comparisons(found: Found) -> Rows:
    """Every verdict, and for those that moved also the verdict of a second sampling."""
    again = {(v.arm, v.axes): v for v in found.repeated}
    lines: Rows = [["arm", "gap", "", "seed by seed", "two seeds of the baseline", "in a second sampling", "verdict"]]
    for v in found.verdicts:
        second = again.get((v.arm, v.axes)) if v.moved else None
        repeated = f"{second.gap}; {second.seeds}; {second.noise:.3f}" if second else ""
        judged = v.judged if v in found.moved else NO_EFFECT
        lines.append([v.arm, v.measure, v.gap, v.seeds, f"{v.noise:.3f}", repeated, judged])
    return lines


def controlled(found: Found) -> Rows:
    """Every arm against the baseline stopped at an equal loss. Losses: the arm's, the baseline's."""
    lines: Rows = [["arm", "equal loss", "gap", "", "seed by seed", "two such seeds", "stopped at (losses)", "verdict"]]
    for control in found.controls:
        v = control.verdict
        stops = ", ".join(f"{s.step} ({s.losses[0]:.3f}, {s.losses[1]:.3f})" for s in control.stops)
        kind = control.stops[0].kind
        lines.append([v.arm, kind, v.measure, v.gap, v.seeds, f"{v.noise:.3f}", stops, v.judged])
    return lines if found.controls else []


def arms(found: Found) -> Rows:
    """Settings, and the loss on held-out replies at temperature 1: mean over seeds, and each seed's difference."""
    lines = [["arm", "chosen settings", "nats per token on held-out replies", "seed by seed, minus the baseline's"]]
    nats = {arm: [_nats(curve) for curve in curves] for arm, curves in found.curves.items()}
    for arm, values in nats.items():
        less = ", ".join(f"{a - b:+.3f}" for a, b in zip(values, nats[BASELINE], strict=True))
        settings = next(dict(run.settings) for run in judged(found.plan, found.settings) if run.arm.name == arm)
        lines.append([arm, _said(settings), f"{np.mean(values):.3f}", "" if arm == BASELINE else less])
    return lines


def _nats(curve: Curve) -> float:
    (loss,) = curve.losses.values()
    return float(loss.nll.sum() / loss.tokens.sum())


def tried(found: Found) -> Rows:
    lines: Rows = []
    for arm, options in found.tried.items():
        for option in options:
            gains: dict = option["gains"]  # type: ignore[assignment]
            lines = lines or [["arm", "settings", *gains, "chosen"]]
            cells = [f"{gain:+.3f}" for gain in gains.values()]
            lines.append([arm, _said(option["settings"]), *cells, "yes" if option["chosen"] else ""])  # type: ignore[arg-type]
    return lines


def _said(settings: Settings) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def scores(report: Report) -> Rows:
    names = columns(report)
    return [["model", "temperature", *heads(report, names)], *score_rows(report, names, lambda e: f"{e.mean:.3f}")]


def samples(found: Found, place: Place) -> Rows:
    """The first reply of every arm to a few prompts, at the middle temperature and the first seed."""
    temperature = found.plan.temperatures[len(found.plan.temperatures) // 2]
    lines: Rows = []
    for run in judged(found.plan, found.settings)[: len(found.plan.arms)]:
        path = place.curve(run, JUDGING, found.plan).with_suffix(".jsonl")
        replies = [r for r in rows(path) if r["temperature"] == temperature and r["sample"] == 0]
        chosen = [replies[i * len(replies) // SAMPLE_PROMPTS] for i in range(SAMPLE_PROMPTS)]
        lines = lines or [["arm", *(f"{r['question']} ({r['persona']})" for r in chosen)]]
        lines.append([run.arm.name, *(r["text"] for r in chosen)])
    return lines


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)
