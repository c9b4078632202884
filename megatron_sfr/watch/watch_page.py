"""The page of `watch`: every score over the steps, and the replies to the same prompts at each step."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron_sfr.evaluation.compare.tables import direction
from megatron_sfr.evaluation.generate.prompts import Asked, evenly_spaced
from megatron_sfr.evaluation.page.reply_explorer import PERSONAS, PROMPTS
from megatron_sfr.evaluation.page.reply_filter import filters
from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.evaluation.scores.metrics import METRICS, metric
from megatron_sfr.html import bullets, document, download, folded, heading, note, table, wide
from megatron_sfr.storage.user_files import cut
from megatron_sfr.watch.step_chart import STYLE, Series, charts
from megatron_sfr.watch.watch_log import StepScores

STEPS = 12
"""Steps whose replies are on the page; the scores of all steps are."""
REPLIES = 4
CHARACTERS = 400
_STYLE = (
    STYLE
    + """
td.reply { min-width: 11rem; max-width: 26rem; overflow-wrap: anywhere; white-space: pre-line }
td.again { color: var(--quiet); font-style: italic }
tr.next td { border-top: 2px solid var(--line) }
"""
)
_AGAIN = (
    "Grey and slanted: a reply that another sample or persona has given to this prompt at the same step. The column "
    "“different” counts the different replies among all samples."
)


@dataclass(frozen=True)
class Watched:
    """Everything on the page."""

    run: str
    steps: Mapping[int, StepScores]
    real: Mapping[str, Estimate]
    """The scores of the real replies, if there are some."""
    asked: Sequence[Asked]
    replies: Mapping[int, Sequence[Sequence[str]]]
    """The replies of the steps of `shown_steps`, by entry of `asked`."""
    sampling: str
    """How replies are sampled, in words."""


def shown_steps(steps: Sequence[int]) -> list[int]:
    """At most STEPS of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]


def page(watched: Watched) -> str:
    """The HTML page. Nothing on it needs a script to be read."""
    names = _names(watched.steps.values())
    main, details = ([name for name in names if metric(name).detail == is_detail] for is_detail in (False, True))
    parts = [note(_about(watched)), heading("What changed beyond noise"), *_changes(watched.steps, names)]
    parts += [heading("Scores over steps"), charts([_series(name, watched) for name in main])]
    if watched.real:
        parts += [note("Dashed: the real replies.")]
    parts += [folded("more scores", charts([_series(name, watched) for name in details]))] if details else []
    rows = _score_rows(watched, names)
    parts += [folded("all scores as a table", table(rows)), download("watch.csv", rows)]
    parts += [note("Intervals are 95 % bootstrap intervals over prompts; they cover prompts and sampling.")]
    parts += [heading("Replies to the same prompts"), note(_AGAIN), filters({}), *_replies(watched)]
    meanings = [[name, metric(name).kind, metric(name).meaning + direction(name)] for name in names]
    parts += [heading("What the scores mean"), table([["score", "kind", "meaning"], *meanings])]
    return document(f"{watched.run}: replies while it trains", parts, _STYLE)


def _about(watched: Watched) -> str:
    steps = list(watched.steps)
    newest = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(watched.steps[steps[-1]].time))
    prompts = len({entry.prompt.shared for entry in watched.asked})
    return (
        f"{len(steps)} checkpoints, step {steps[0]:,} to {steps[-1]:,}; the newest was scored {newest}. {prompts} "
        f"prompts, {len(watched.asked)} pairs of prompt and persona, {watched.sampling}. Reload the page for new steps."
    )


def _names(steps: Iterable[StepScores]) -> list[str]:
    known = {name for scores in steps for name in scores.scores}
    return [name for name in METRICS if name in known]


def _changes(steps: Mapping[int, StepScores], names: Sequence[str]) -> Iterator[str]:
    """The scores of the first and the last step whose intervals do not overlap."""
    first, last = (list(steps.values())[i] for i in (0, -1))
    found = []
    for name in names:
        if name not in first.intervals or name not in last.intervals or metric(name).detail:
            continue
        (low, high), (low_now, high_now) = first.intervals[name], last.intervals[name]
        if low_now <= high and low <= high_now:
            continue
        change = "rose" if low_now > high else "fell"
        found.append(
            f"{name} {change} from {_cell(first, name)} at step {first.step:,} to {_cell(last, name)} at step "
            f"{last.step:,}{_meaning(name, change)}."
        )
    yield bullets(found) if found else note("Nothing between the first step and the last.")


def _meaning(name: str, change: str) -> str:
    """What a change of a score says."""
    score = metric(name)
    if score.right is not None:
        return direction(name)
    better = (change == "fell") == score.lower
    if score.kind == "diversity":
        return ": more diverse" if better else ": less diverse"
    return ": better" if better else ": worse"


def _series(name: str, watched: Watched) -> Series:
    known = [scores for scores in watched.steps.values() if name in scores.scores]
    real = watched.real.get(name)
    intervals = [(scores.intervals[name][0], scores.intervals[name][1]) for scores in known]
    return Series(
        name,
        direction(name).strip(" ()"),
        [scores.step for scores in known],
        [scores.scores[name] for scores in known],
        intervals,
        real.mean if real else metric(name).right,
    )


def _score_rows(watched: Watched, names: Sequence[str]) -> list[list[str]]:
    rows = [["step", *names]]
    if watched.real:
        rows.append(["real", *(str(watched.real[name]) if name in watched.real else "-" for name in names)])
    for scores in watched.steps.values():
        rows.append([str(scores.step), *(_cell(scores, name) for name in names)])
    return rows


def _cell(scores: StepScores, name: str) -> str:
    """A score with its interval."""
    if name not in scores.scores:
        return "-"
    mean, low, high = (round(value, 3) + 0.0 for value in (scores.scores[name], *scores.intervals[name]))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _replies(watched: Watched) -> Iterator[str]:
    """A folded table for each of the shown prompts; the first one is open."""
    shared = list(dict.fromkeys(entry.prompt.shared for entry in watched.asked))
    for i, key in enumerate(evenly_spaced(shared, PROMPTS)):
        entries = [k for k, entry in enumerate(watched.asked) if entry.prompt.shared == key][:PERSONAS]
        question = watched.asked[entries[0]].prompt.question
        yield folded(cut(question, 200), _reply_table(watched, entries), opened=i == 0, kind="replies")


def _reply_table(watched: Watched, entries: Sequence[int]) -> str:
    """Steps from above to below, for one persona after another; samples from left to right."""
    given = {step: _repeated(rows, entries) for step, rows in watched.replies.items()}
    columns = min(REPLIES, max(len(rows[k]) for rows in watched.replies.values() for k in entries))
    personas = any(watched.asked[k].prompt.persona for k in entries)
    head = [*(["persona"] if personas else []), "step", "different", *(f"reply {i + 1}" for i in range(columns))]
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for k in entries:
        for step, rows in watched.replies.items():
            texts = rows[k]
            cells = [f"<td>{escape(watched.asked[k].prompt.persona or '')}</td>"] if personas else []
            cells += [f'<td class="n">{step:,}</td>', f'<td class="n">{len(set(texts))} of {len(texts)}</td>']
            for i, text in enumerate(texts[:columns]):
                mark = " again" if (k, i) in given[step] else ""
                cells.append(f'<td class="reply{mark}">{escape(_short(text))}</td>')
            lines.append("".join(cells))
    rest = len(watched.replies)
    marks = [' class="next"' if i and (i - 1) % rest == 0 else "" for i in range(len(lines))]
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    return wide(f"<table>{body}</table>")


def _repeated(rows: Sequence[Sequence[str]], entries: Sequence[int]) -> set[tuple[int, int]]:
    """(entry, sample) of the replies to one prompt that an earlier entry or sample has given."""
    seen: set[str] = set()
    found = set()
    for k in entries:
        for i, text in enumerate(rows[k]):
            if text in seen:
                found.add((k, i))
            seen.add(text)
    return found


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
