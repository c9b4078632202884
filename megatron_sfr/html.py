"""Self-contained HTML pages: styles and images are embedded, so that one file can be shared and opened offline."""

import base64
import csv
import io
import re
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #2b303b; --page: #fff; --line: #e1e4ea; --quiet: #667 }
@media (prefers-color-scheme: dark) { :root { --text: #d9dce3; --page: #16181d; --line: #363b46; --quiet: #9aa3b2 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 76rem }
body { margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
th { white-space: nowrap; vertical-align: bottom } td { vertical-align: top } .n { text-align: right }
td.n { white-space: nowrap } summary { cursor: pointer; padding: .2rem 0 }
img { max-width: 100%; background: #fff; border-radius: 3px } pre { white-space: pre-wrap; margin: 0 }
.note { color: var(--quiet); font-size: 13px } input, select { font: inherit; max-width: 100% }
input { width: min(28rem, 100%) }
@media (max-width: 40rem) { .wide img { max-width: none; width: 54rem } }
@media print {
  body { max-width: none; margin: 0 } input, select { display: none } tr { break-inside: avoid }
  .wide { overflow: visible } table { font-size: 8px } th, td, td.n { white-space: normal; padding: .1rem .2rem }
}
"""
NUMBER = re.compile(r"[-+−]?[\d.]")
FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""How a cell begins that spreadsheets may take for a formula (OWASP, CSV injection); the last four are full-width."""
_VALUE = r"[-+]?[\d.]+(e[-+]?\d+)?"
HARMLESS = re.compile(rf"-|{_VALUE}( \[{_VALUE}, {_VALUE}\])?")
"""Cells that are numbers, with or without an interval, or stand for no number."""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A complete HTML page; `parts` are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{style}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def wide(content: str) -> str:
    """A part that scrolls sideways where the screen is too narrow; `content` is HTML."""
    return f'<div class="wide">{content}</div>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first row is the header, cells are plain text. Columns of numbers are aligned to the right."""
    head, *body = rows
    numeric = [_is_numeric([row[i] for row in body]) for i in range(len(head))]
    lines = [_row("th", head, numeric), *(_row("td", row, numeric) for row in body)]
    return wide(f"<table>{''.join(lines)}</table>")


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    marks = [' class="n"' if is_number else "" for is_number in numeric]
    found = (f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
    return f"<tr>{''.join(found)}</tr>"


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether all cells that have a value begin with a number."""
    known = [cell for cell in cells if cell not in ("", "-")]
    return bool(known) and all(NUMBER.match(cell) for cell in known)


def folded(summary: str, content: str, *, opened: bool = False, kind: str = "") -> str:
    """A section that opens and closes on a click; `content` is HTML, `kind` a CSS class."""
    marks = (f' class="{kind}"' if kind else "") + (" open" if opened else "")
    return f"<details{marks}><summary>{escape(summary)}</summary>{content}</details>"


def download(name: str, rows: Sequence[Sequence[str]]) -> str:
    """A link to the rows as a CSV file, which is embedded. Texts that could be formulas begin with a single quote."""
    text = io.StringIO()
    csv.writer(text).writerows([_csv_cell(cell) for cell in row] for row in rows)
    content = base64.b64encode(text.getvalue().encode()).decode()
    link = f'<a download="{escape(name)}" href="data:text/csv;charset=utf-8;base64,{content}">{escape(name)}</a>'
    return f'<p class="note">{link}</p>'


def _csv_cell(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) and not HARMLESS.fullmatch(text) else text


def bullets(texts: Sequence[str]) -> str:
    """A bullet list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def image(png: bytes, words: str) -> str:
    """An embedded PNG; `words` is its alternative text."""
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
