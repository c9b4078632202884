"""Anchors and their future segments: what a position has to predict (SFR, arXiv 2605.27971).

A reply is the supervised tokens y_0 ... y_{N-1} of one assistant turn, its end token last. Its anchors are at the
ordinals j = 0, stride, 2 stride, ...: the condition is the hidden state at the input position just before y_j (the last
prompt position for j = 0). After an empty thought, which some templates have a model write, the ordinals start at the
token that follows it. The target of an anchor at the horizon (o, L) is the embedding of the text of L units of the
reply, from the o-th on that starts at or after y_j, cut at y_{N-1}. Where units are tokens these are
y_{j+o-1} ... y_{j+o+L-2}. So a target holds no token up to its position and nothing of another turn. The horizon
`reply` is the exception: its target is the text of the whole reply at each anchor, as by default in SFR's public code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sfr.data.chat.rendered_turns import EMPTY_THOUGHT
from megatron_sfr.data.segments.segmenters import SEGMENTERS, Segmenter, TokenUnits, Units, is_whole_reply
from megatron_sfr.data.segments.token_text import TokenText, token_text

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Segment:
    """An anchor at one horizon: the condition is at input position `position`, the target is tokens[start:end].

    Its text is the characters that begin in these tokens.
    """

    position: int
    start: int
    end: int
    response: int
    ordinal: int
    length: int
    """Length of the reply in tokens."""
    horizon: int


@dataclass(frozen=True)
class Cut:
    """How replies are cut into segments: stride and min_segment_length in tokens, horizons in units of the segmenter.

    `window` counts tokens, `sentence` the sentences of `sentence_starts`, `statement` those of `statements`.
    """

    stride: int
    horizons: Sequence[Sequence[int]]
    min_segment_length: int
    segmenter: Segmenter = "window"


def futures(
    tokens: np.ndarray, replies: Sequence[tuple[int, int]], tokenizer: Any, cut: Cut
) -> Iterator[tuple[Segment, str]]:
    """The segments of the replies [start, end) of tokens [n] and their exact texts, by position, then horizon.

    Left out are those of white space alone, and those that the end of the reply cuts to fewer units than L and fewer
    tokens than `min_segment_length`. RecordError or ValueError where the tokenizer has no exact texts (`token_text`).
    """
    for response, (start, end) in enumerate(replies):
        text = token_text(tokens[start:end], tokenizer)
        skipped = _empty_thought(text)
        said = start + skipped
        text = token_text(tokens[said:end], tokenizer) if skipped else text
        for ordinal, horizon, first, last in spans(SEGMENTERS[cut.segmenter](text), cut):
            target = text.between(first, last)
            if target and not target.isspace():
                segment = Segment(
                    position=said + ordinal - 1,
                    start=said + first,
                    end=said + last,
                    response=response,
                    ordinal=skipped + ordinal,
                    length=end - start,
                    horizon=horizon,
                )
                yield segment, target


def _empty_thought(text: TokenText) -> int:
    """How many tokens an empty thought takes at the start of a reply, 0 without one."""
    found = EMPTY_THOUGHT.match(text.text)
    return min(int(text.tokens_at([found.end()])[0]), len(text.begins) - 2) if found else 0


def spans(units: Units | TokenUnits, cut: Cut) -> Iterator[tuple[int, int, int, int]]:
    """(ordinal j, horizon, start, end) of each target of a reply, in its tokens from 0; by ordinal, then horizon."""
    anchors = np.arange(0, units.N, cut.stride)
    found = []
    for horizon, (offset, length) in enumerate(cut.horizons):
        if is_whole_reply((offset, length)):
            start, end, whole = np.zeros_like(anchors), np.full_like(anchors, units.N), np.full(len(anchors), True)
        else:
            start, end, whole = units.ahead(anchors, offset, length)
        keep = (start < units.N) & (whole | (end - start >= cut.min_segment_length))
        found.append(np.stack([anchors, np.full_like(anchors, horizon), start, end], axis=1)[keep])
    rows = np.concatenate(found)
    yield from map(tuple, rows[np.argsort(rows[:, 0], kind="stable")].tolist())


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text in prepared data and in target stores: BLAKE2b of its UTF-8."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


ChunkSegment = tuple[bytes, bytes]
"""A distinct text of a chunk: its digest, and its line of segments.jsonl."""


class ChunkTexts:
    """The distinct texts of a chunk, numbered in order of appearance."""

    def __init__(self) -> None:
        self._segments: dict[bytes, tuple[int, bytes]] = {}

    def number(self, text: str) -> int:
        """The number of a text within the chunk."""
        digest = text_digest(text)
        if digest not in self._segments:
            line = (json.dumps(text, ensure_ascii=False) + "\n").encode("utf-8")
            self._segments[digest] = len(self._segments), line
        return self._segments[digest][0]

    def segments(self) -> list[ChunkSegment]:
        """Digest and line of each text, by number."""
        return [(digest, line) for digest, (_, line) in self._segments.items()]


class DistinctTexts:
    """Numbers texts by content from 0; remembers the digest of each, not the text."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, digest: bytes) -> tuple[int, bool]:
        """The number of the text that has this digest, and whether it is new."""
        known = len(self._rows)
        row = self._rows.setdefault(digest, known)
        return row, row == known
