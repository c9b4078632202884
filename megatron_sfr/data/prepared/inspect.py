"""The contents of a prepared folder for people: counts, and a sample as text with its supervised parts."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat.formats import TITLES
from megatron_sfr.data.chat.template_options import ALL_TOGETHER
from megatron_sfr.data.chat.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_sfr.data.prepared.conversations import PreparedData, PreparedManifest, Sample
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.segments.segmenters import format_horizons

PERCENTILES = (10, 50, 90, 99)
MOST_PERSONAS = 12


@dataclass(frozen=True)
class Piece:
    """A text that is supervised throughout, or not at all."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Future:
    """An anchor of a sample at one horizon, and the text to predict."""

    position: int
    response: int
    ordinal: int
    length: int
    horizon: str
    text: str


def tokenizer_of(data: PreparedData, tokenizer: str | None = None) -> Any:
    """The tokenizer that the folder was prepared with, at its old path or another. ValueError if it differs."""
    place = tokenizer or data.manifest.tokenizer
    if tokenizer is None and os.path.isabs(place) and not Path(place).is_dir():
        raise ValueError(f"the tokenizer of {data.folder} is no longer at {place}; give its path with --tokenizer DIR")
    loaded = load_tokenizer(place)
    if tokenizer_sha256(loaded) != data.manifest.tokenizer_sha256:
        raise ValueError(
            f"{data.folder} was prepared with another tokenizer or chat template than {place} has now; "
            "name that one with --tokenizer DIR"
        )
    return loaded


def pieces(sample: Sample, tokenizer: Any) -> list[Piece]:
    """The text of a sample with its special tokens, divided where the mask changes.

    A character of several tokens is in the piece in which it ends.
    """
    changes = np.flatnonzero(np.diff(sample.loss_mask)) + 1
    borders = [0, *changes.tolist(), len(sample.tokens)]
    text = _decode(sample.tokens, tokenizer)
    at = [_agree(text, _decode(sample.tokens[:border], tokenizer)) for border in borders[:-1]]
    found = []
    for start, end, border in zip(at, [*at[1:], len(text)], borders[:-1], strict=True):
        if end > start:
            found.append(Piece(text[start:end], bool(sample.loss_mask[border])))
    return found


def futures_of(data: PreparedData, sample: Sample) -> Iterator[Future]:
    """The anchors of a sample, in order."""
    a = sample.anchors
    for i in range(len(a.position)):
        yield Future(
            position=int(a.position[i]),
            response=int(a.response[i]),
            ordinal=int(a.ordinal[i]),
            length=int(a.length[i]),
            horizon=format_horizons([data.manifest.horizons[a.horizon[i]]]),
            text=data.texts[int(a.segment[i])],
        )


def counts(data: PreparedData) -> list[tuple[str, str]]:
    """The counts of a folder of conversations, as names and texts."""
    m = data.manifest
    lengths = data.lengths
    levels = ", ".join(f"{q} %: {np.percentile(lengths, q):,.0f}" for q in PERCENTILES)
    files = ", ".join(f"{Path(record['path']).name} ({TITLES[record['format']]})" for record in m.inputs)
    return [
        ("inputs", files),
        (
            "conversations",
            f"{_conversations(m)}; {m.duplicates:,} duplicates, {m.truncated:,} truncated, {m.rejected:,} rejected",
        ),
        *_chat_options(m),
        ("tokens", f"{m.tokens:,}; {m.supervised_tokens:,} supervised ({m.supervised_tokens / m.tokens:.1%})"),
        ("lengths", f"{levels}, longest: {lengths.max():,} (at most {m.seq_length:,} + 1)"),
        (
            "anchors",
            f"{m.anchors:,} at {format_horizons(m.horizons)}, every {m.stride} tokens; {m.max_anchors:,} at most",
        ),
        ("segments", f"{m.segments:,} distinct"),
        ("personas", _personas(m.personas)),
    ]


def _conversations(manifest: PreparedManifest) -> str:
    if manifest.conversations in (None, manifest.samples):
        return f"{manifest.samples:,}"
    return f"{manifest.conversations:,} in {manifest.samples:,} samples"


def _chat_options(manifest: PreparedManifest) -> list[tuple[str, str]]:
    """The options of the chat template that are not the default, and what they did to the replies."""
    default = asdict(ALL_TOGETHER)
    found = [f"{name} {value}" for name, value in (manifest.chat or {}).items() if value != default.get(name)]
    if manifest.unlike_last:
        found.append(f"{manifest.unlike_last:,} replies without the empty thought of the last one")
    if manifest.unlike_inference:
        found.append(f"{manifest.unlike_inference:,} replies unlike at inference")
    return [("chat", "; ".join(found))] if found else []


def document_counts(data: PreparedDocuments) -> list[tuple[str, str]]:
    """The counts of a folder of documents, as names and texts."""
    m = data.manifest
    return [
        ("inputs", ", ".join(Path(record["path"]).name for record in m.inputs)),
        ("documents", f"{m.documents:,}; {m.rejected:,} rejected"),
        ("tokens", f"{m.tokens:,} in {data.corpus}.bin"),
        ("anchors", f"{m.anchors:,} at {format_horizons(m.horizons)}, every {m.stride} tokens"),
        ("segments", f"{m.segments:,} distinct, by {m.segmenter}"),
    ]


def futures_of_document(data: PreparedDocuments, number: int) -> Iterator[tuple[int, str, str]]:
    """The anchors of a document, in order: position, horizon and the text to predict."""
    for position, segment, horizon in zip(*data.anchors(number), strict=True):
        yield int(position), format_horizons([data.manifest.horizons[horizon]]), data.texts[int(segment)]


def _personas(personas: dict[str, int]) -> str:
    named = sorted(((name, count) for name, count in personas.items() if name), key=lambda item: -item[1])
    parts = [f"{name} {count:,}" for name, count in named[:MOST_PERSONAS]]
    if more := named[MOST_PERSONAS:]:
        parts.append(f"{len(more):,} more with {sum(count for _, count in more):,}")
    if without := personas.get(""):
        parts.append(f"none {without:,}")
    return f"{len(named):,}: " + ", ".join(parts)


def _agree(whole: str, start: str) -> int:
    """Length of the common prefix: all of `start`, without a last character that is incomplete in it."""
    return next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), min(len(whole), len(start)))


def _decode(tokens: np.ndarray, tokenizer: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
