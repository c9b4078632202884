"""Anchors and their future segments: what a position is to foresee (SFR, arXiv 2605.27971).

A reply is the supervised tokens y_0 ... y_{N-1} of one assistant turn, its end token last. Its anchors stand at the
ordinals j = 0, stride, 2 stride, ...: the condition is the hidden state at the input position just before y_j (the last
prompt position for j = 0). Its target at the horizon (o, L) is the embedding of the text of y_{j+o-1} ... y_{j+o+L-2},
cut at y_{N-1}. So a target holds no token up to its position and nothing of another turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Segment:
    """An anchor at one horizon: the condition is at input position `position`, the target is tokens[start:end]."""

    position: int
    start: int
    end: int
    response: int
    ordinal: int
    length: int  # of the reply
    horizon: int


def future_segments(
    replies: Sequence[tuple[int, int]],
    *,
    stride: int,
    horizons: Sequence[Sequence[int]],
    min_segment_length: int,
) -> Iterator[Segment]:
    """The segments of replies [start, end) at each horizon, by position, then horizon.

    Left out are those of fewer than `min_segment_length` tokens that are not whole either: of a horizon (o, L) at least
    min(min_segment_length, L) tokens must be there.
    """
    for response, (start, end) in enumerate(replies):
        for anchor in range(start, end, stride):
            for horizon, (offset, length) in enumerate(horizons):
                first = anchor + offset - 1
                if end - first < min(min_segment_length, length):
                    continue
                yield Segment(
                    position=anchor - 1,
                    start=first,
                    end=min(first + length, end),
                    response=response,
                    ordinal=anchor - start,
                    length=end - start,
                    horizon=horizon,
                )


@dataclass(frozen=True)
class Cut:
    """How replies are cut into segments; lengths in tokens of the model's tokenizer."""

    stride: int
    horizons: Sequence[Sequence[int]]
    min_segment_length: int


def futures(
    tokens: np.ndarray, replies: Sequence[tuple[int, int]], tokenizer: Any, cut: Cut
) -> Iterator[tuple[Segment, str]]:
    """Each segment of the replies [start, end) of tokens [n], and its text; those of white space alone are left out."""
    segments = future_segments(
        replies, stride=cut.stride, horizons=cut.horizons, min_segment_length=cut.min_segment_length
    )
    for segment in segments:
        if (text := segment_text(tokens, segment, tokenizer)).strip():
            yield segment, text


def segment_text(tokens: np.ndarray, segment: Segment, tokenizer: Any) -> str:
    """The text of a segment as the encoder reads it: no special tokens, no tidying of spaces."""
    ids = tokens[segment.start : segment.end]  # an array: decode checks a list element by element
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text in prepared data and in target stores: BLAKE2b of its UTF-8."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


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
