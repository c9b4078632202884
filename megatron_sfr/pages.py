"""Self-contained HTML: one file with its style and its pictures inside, which can be mailed and opened anywhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b303b; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th, td { padding: .25rem .6rem; border-bottom: 1px solid #e1e4ea; text-align: left }
th { white-space: nowrap; vertical-align: bottom } td { vertical-align: top }
img { max-width: 100% } .note { color: #667; font-size: 13px } pre { white-space: pre-wrap; margin: 0 }
"""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page; parts are HTML already."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{style}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; cells are text."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def bullets(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def image(png: bytes, words: str) -> str:
    """A picture inside the page; words say what it shows."""
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
