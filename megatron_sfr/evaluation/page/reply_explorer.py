"""The replies on the page: one line per reply, the nearest real reply beside it, with filters and as a CSV file."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_sfr.evaluation.page.reply_filter import filters
from megatron_sfr.html import download, folded, note, wide
from megatron_sfr.storage.user_files import cut

PROMPTS, PERSONAS = 24, 12  # whose replies are on the page
CHARACTERS = 2000
"""Of a reply."""
STYLE = """
.replies .text { overflow-wrap: anywhere; white-space: pre-line; min-width: 14rem; width: 45% }
.replies .next td { border-top: 2px solid var(--line) }
@media print { .replies table { font-size: 10px } }
@media (max-width: 40rem) {
  .replies :is(table, tbody, tr:not([hidden]), .text) { display: block; width: auto; min-width: 0 }
  .replies tr:first-child { display: none } .replies tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  .replies td { display: inline-block; border: 0 !important; padding: .1rem .6rem .1rem 0; text-align: left }
  .replies td[data-name]:not(:empty)::before { content: attr(data-name) " "; color: var(--quiet) }
}
"""


@dataclass(frozen=True)
class ShownReply:
    """One line: a reply with the real reply that is nearest to it, if one is known."""

    persona: str
    temperature: str
    model: str
    text: str
    nearest_persona: str = ""
    nearest: str = ""
    similarity: float | None = None


@dataclass(frozen=True)
class Explorer:
    """The replies on the page, by prompt, and how they were chosen and compared, in words."""

    prompts: Sequence[tuple[str, Sequence[ShownReply]]]
    about: str


def section(explorer: Explorer) -> list[str]:
    """The replies as HTML: filters, a folded table per prompt, and a link to the CSV file."""
    replies = [reply for _, given in explorer.prompts for reply in given]
    personas = sorted({reply.persona for reply in replies})
    choices = {"model": (2, list(dict.fromkeys(reply.model for reply in replies)))}
    if len(personas) > 1:
        choices["persona"] = (0, personas)
    parts = [note(explorer.about), download("replies.csv", _csv(explorer)), filters(choices)]
    for k, (question, given) in enumerate(explorer.prompts):
        parts.append(folded(cut(question, 300), _table(given), opened=k == 0, kind="replies"))
    return parts


def _csv(explorer: Explorer) -> list[list[str]]:
    head = ["prompt", "persona", "temperature", "model", "reply", "nearest real reply", "its persona", "similarity"]
    return [head] + [
        [
            *(question, reply.persona, reply.temperature, reply.model, _short(reply.text), _short(reply.nearest)),
            *(reply.nearest_persona, _similarity(reply)),
        ]
        for question, replies in explorer.prompts
        for reply in replies
    ]


def _table(replies: Sequence[ShownReply]) -> str:
    """One line per reply, so that it can be read on a narrow screen; a rule where the persona changes."""
    compared = any(reply.similarity is not None for reply in replies)
    names = ["persona", "T", "model", "reply", *(["nearest real reply", "similarity"] if compared else [])]
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    before = replies[0].persona if replies else ""
    for reply in replies:
        mark = ' class="next"' if reply.persona != before else ""
        before = reply.persona
        lines.append(f"<tr{mark}>{_cells(reply, compared)}</tr>")
    return wide(f"<table>{''.join(lines)}</table>")


def _cells(reply: ShownReply, compared: bool) -> str:
    cells = [f"<td>{escape(reply.persona)}</td>", f'<td class="n" data-name="T">{escape(reply.temperature)}</td>']
    cells += [f"<td>{escape(reply.model)}</td>", f'<td class="text">{escape(_short(reply.text))}</td>']
    if compared:
        other = reply.nearest_persona != reply.persona
        who = f' <span class="note">({escape(reply.nearest_persona or "no persona")})</span>' if other else ""
        near = escape(_short(reply.nearest)) + (who if reply.nearest else "")
        cells.append(f'<td class="text near" data-name="nearest real:">{near}</td>')
        cells.append(f'<td class="n" data-name="similarity">{_similarity(reply)}</td>')
    return "".join(cells)


def _similarity(reply: ShownReply) -> str:
    return "" if reply.similarity is None else f"{reply.similarity:.2f}"


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
