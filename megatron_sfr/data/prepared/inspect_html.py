"""Prepared samples as an HTML page: one file, without scripts or external resources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.inspect import counts, futures_of, pieces

SAMPLES = 5
HEAD = """<!doctype html>
<meta charset="utf-8">
<title>Prepared samples</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; color: #777 }
mark { background: #c9efc9; color: #063 }
td { vertical-align: top; padding: .2em 1em .2em 0 }
</style>
"""


def write_page(path: Path, data: PreparedData, samples: Sequence[int], tokenizer: Any) -> None:
    """Writes the folder's counts and these samples, with supervised text marked and the anchors in a table."""
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}\n" for name, text in counts(data))
    body = [f"<h1>{escape(str(data.folder))}</h1>\n<table>\n{rows}</table>\n"]
    body += [_sample(data, number, tokenizer) for number in samples]
    path.write_text(HEAD + "".join(body), encoding="utf-8")


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
