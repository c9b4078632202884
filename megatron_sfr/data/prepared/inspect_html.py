"""Prepared samples as an HTML page: one file, without scripts or external resources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.inspect import counts, futures_of, pieces
from megatron_sfr.html import document
from megatron_sfr.storage.atomic import replacing

SAMPLES = 5
STYLE = "pre { color: var(--quiet) } mark { background: #c9efc9; color: #063 }"
"""Beside that of all pages."""


def write_page(path: Path, data: PreparedData, samples: Sequence[int], tokenizer: Any) -> None:
    """Writes the folder's counts and these samples, with supervised text marked and the anchors in a table."""
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}\n" for name, text in counts(data))
    parts = [f"<table>\n{rows}</table>", *(_sample(data, number, tokenizer) for number in samples)]
    with replacing(path) as file:
        file.write(document(str(data.folder), parts, STYLE))


def _sample(data: PreparedData, number: int, tokenizer: Any) -> str:
    sample = data[number]
    text = "".join(
        f"<mark>{escape(piece.text)}</mark>" if piece.supervised else escape(piece.text)
        for piece in pieces(sample, tokenizer)
    )
    rows = [
        f"<tr><td>{f.position}<td>{f.ordinal} of {f.length}<td>{f.horizon}<td>{escape(f.text)}\n"
        for f in futures_of(data, sample)
    ]
    persona = f", persona {escape(sample.persona)}" if sample.persona else ""
    return (
        f"<h2>Sample {number}{persona}</h2>\n<pre>\n{text}</pre>\n"
        f"<details><summary>{len(rows)} anchors and their futures</summary>\n"
        f"<table>\n<tr><th>position<th>ordinal<th>horizon<th>future\n{''.join(rows)}</table></details>\n"
    )
