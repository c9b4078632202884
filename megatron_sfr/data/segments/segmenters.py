"""Segmenters: divide a reply into units, which horizons count, and find the units ahead of each anchor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_sfr.data.segments.sentences import sentence_starts
from megatron_sfr.data.segments.statements import statements
from megatron_sfr.data.segments.token_text import TokenText

Segmenter = Literal["window", "sentence", "statement"]


@dataclass(frozen=True)
class Units:
    """U units of N tokens: unit u is tokens starts[u] ... ends[u] - 1. starts ascend, ends[u] > starts[u]; int64 [U].

    Units may contain others. The unit that follows u is the first one that starts at or after ends[u].
    """

    starts: np.ndarray
    ends: np.ndarray
    N: int

    def ahead(self, anchors: np.ndarray, offset: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and end of `length` units ahead of anchors [A], [A] each, and whether all of them exist.

        The first unit starts at or after the anchor, the o-th follows the (o-1)-th. The end is N if a unit is missing;
        so is the start if the first of them is.
        """
        starts, ends = np.append(self.starts, self.N), np.append(self.ends, self.N)  # unit U stands for none
        follows = np.searchsorted(self.starts, ends)
        first = _steps(follows, offset - 1)[np.searchsorted(self.starts, anchors)]
        last = _steps(follows, length - 1)[first]
        return starts[first], ends[last], last < len(self.starts)


def _steps(follows: np.ndarray, steps: int) -> np.ndarray:
    """The unit reached from each one [U + 1] after `steps` steps, by doubling: O(U log steps)."""
    reached = np.arange(len(follows))
    steps = min(steps, len(follows))
    while steps:
        if steps & 1:
            reached = follows[reached]
        follows, steps = follows[follows], steps >> 1
    return reached


def tokens_as_units(text: TokenText) -> Units:
    N = len(text.begins) - 1
    return Units(np.arange(N), np.arange(1, N + 1), N)


def sentences_as_units(text: TokenText) -> Units:
    """Sentences. A token belongs to the sentence that contains its first byte."""
    starts = sentence_starts(text.text)
    return _in_tokens(text, starts, [*starts[1:], len(text.text)])


def statements_as_units(text: TokenText) -> Units:
    """Statements. A token belongs to the statements that contain its first byte."""
    return _in_tokens(text, *statements(text.text))


SEGMENTERS: dict[Segmenter, Callable[[TokenText], Units]] = {
    "window": tokens_as_units,
    "sentence": sentences_as_units,
    "statement": statements_as_units,
}


def _in_tokens(text: TokenText, first: Sequence[int], after: Sequence[int]) -> Units:
    """Units from characters. Drops those in which no token starts, and the earlier of two that start at one token."""
    N = len(text.begins) - 1
    starts, ends = text.tokens_at(first), text.tokens_at(after)
    starts, ends = starts[ends > starts], ends[ends > starts]
    apart = np.diff(starts, append=N) > 0
    return Units(starts[apart], ends[apart], N)
