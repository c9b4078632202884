"""Self-contained HTML pages: styles and images are embedded, so that one file can be shared and opened offline."""

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
    """A complete HTML page; `parts` are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{style}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first row is the header, cells are plain text."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


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
