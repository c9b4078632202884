"""The diagnosis as one HTML page: text coloured by Lock and Fork, numbers as tooltips, and the futures at forks."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.evaluation.lock_fork.futures import Futures, nearest
from megatron_sfr.evaluation.lock_fork.summary import COLOURS, Diagnosis, picture
from megatron_sfr.html import bullets, document, heading, image, note, table

SHOWN = 12  # samples whose text is shown
FORKS = 3  # per shown sample: its most dispersed forks, whose futures are listed
STYLE = f"""
.text {{ white-space: pre-wrap; border-left: 3px solid #e1e4ea; padding-left: .8rem; margin: 1rem 0 .4rem }}
.text span {{ border-radius: 2px }} .asked {{ color: #8a90a0 }}
.lock {{ background: {COLOURS["lock"]}33 }} .fork {{ background: {COLOURS["fork"]}66 }}
"""


def page(
    diagnosis: Diagnosis,
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    tokenizer: Any,
    data: PreparedData,
    store: TargetStore | None = None,
) -> str:
    """The page. rows: from summary.table. store: where to look up the segments nearest to the futures."""
    parts = [bullets([f"The labels are those of {diagnosis.base}: {diagnosis.labelled.rule}.", *notes])]
    parts += [heading("At locks and at forks"), table(rows)]
    parts += [heading("Where they are"), image(picture(diagnosis), "shares of Lock and Fork by position and persona")]
    parts += [heading("Text"), note("Blue: lock. Red: fork. Grey: given text. Hover over a token for its numbers.")]
    for index in list(dict.fromkeys(diagnosis.where.sample.tolist()))[:SHOWN]:
        parts.append(f'<div class="text">{"".join(_spans(diagnosis, index, data, tokenizer))}</div>')
        if store is not None and diagnosis.futures is not None:
            parts += _forks(diagnosis, diagnosis.futures, index, store, tokenizer)
    return document("Lock and Fork", parts, STYLE)


def pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds. A character of several tokens is added by its last token."""
    added, length = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:end]))
        complete = text if not text.endswith("\ufffd") else text[:length]
        added.append(complete[length:])
        length = max(length, len(complete))
    return added


def _spans(diagnosis: Diagnosis, index: int, data: PreparedData, tokenizer: Any) -> Iterator[str]:
    """One span per token of the sample; predicted tokens carry their label and numbers."""
    at = {int(diagnosis.where.place[n]) + 1: n for n in np.flatnonzero(diagnosis.where.sample == index)}
    for place, text in enumerate(pieces(data[index].tokens.tolist(), tokenizer)):
        if place in at:
            n = at[place]
            yield f'<span class="{diagnosis.labelled.label[n]}" title="{_numbers(diagnosis, n)}">{escape(text)}</span>'
        else:
            yield f'<span class="asked">{escape(text)}</span>'


def _numbers(diagnosis: Diagnosis, n: Any) -> str:
    lines = []
    for name, reading in diagnosis.readings.items():
        values = (reading.entropy[n], reading.top[n], reading.tail[n], reading.nll[n])
        lines.append("{}: H {:.2f}, top-1 {:.2f}, tail {:.3f}, CE {:.2f}".format(name, *values))
    if diagnosis.futures is not None:
        at = diagnosis.futures
        spread, number, gain = at.dispersion[n], at.clusters[n], at.gain[n]
        lines.append(f"futures: dispersion {spread:.2f}, clusters {number}, gain {gain:.1f} nats")
    return escape("\n".join(lines))


def _forks(diagnosis: Diagnosis, found: Futures, index: int, store: TargetStore, tokenizer: Any) -> Iterator[str]:
    """The most dispersed forks of a sample: the clusters of their futures, each with the nearest real segment."""
    chosen = np.flatnonzero((diagnosis.where.sample == index) & (diagnosis.labelled.label == "fork"))
    for n in chosen[np.argsort(-found.dispersion[chosen], kind="stable")][:FORKS]:
        first, count = np.unique(found.groups[n], return_counts=True)
        row, cosine = nearest(found.vectors[n][first], store)
        token = tokenizer.decode([int(diagnosis.where.token[n])])
        place, drawn = diagnosis.where.place[n] + 1, len(found.groups[n])
        yield note(f"Fork before {token!r} (token {place}): real segments nearest to its {drawn} futures, by cluster")
        order = np.argsort(-count, kind="stable")
        texts = [store.prepared.texts[int(row[i])] for i in order]
        yield bullets([f"{count[i]}: {text} ({cosine[i]:.2f})" for i, text in zip(order, texts, strict=True)])
