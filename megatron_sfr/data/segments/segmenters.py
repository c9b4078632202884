"""What horizons count: a reply divided into units, and which units lie ahead of each anchor."""

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
    """Unit u of N tokens is the tokens starts[u] ... ends[u] - 1; starts ascend, and ends[u] > starts[u]; int64 [U].

    Units may hold others. The unit that follows u is the first one that starts at or after ends[u].
    """

    starts: np.ndarray
    ends: np.ndarray
    N: int

    def ahead(self, anchors: np.ndarray, offset: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of anchors [A]: where `length` units ahead start and end, [A] each, and whether so many are there.

        The first unit is the first one that starts at or after the anchor, the o-th the one that follows the (o-1)-th.
        Where the tokens end before the last unit, the end is N; where even the first is missing, so is the start.
        """
        starts, ends = np.append(self.starts, self.N), np.append(self.ends, self.N)  # unit U: no unit
        follows = np.searchsorted(self.starts, ends)
        first = _steps(follows, offset - 1)[np.searchsorted(self.starts, anchors)]
        last = _steps(follows, length - 1)[first]
        return starts[first], ends[last], last < len(self.starts)


def _steps(follows: np.ndarray, steps: int) -> np.ndarray:
    """The unit that is reached from each one [U + 1] in so many steps, by doubling: O(U log steps)."""
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
    """Each token belongs to the sentence where its first byte lies."""
    starts = sentence_starts(text.text)
    return _in_tokens(text, starts, [*starts[1:], len(text.text)])


def statements_as_units(text: TokenText) -> Units:
    """Each token belongs to the statements where its first byte lies."""
    return _in_tokens(text, *statements(text.text))


SEGMENTERS: dict[Segmenter, Callable[[TokenText], Units]] = {
    "window": tokens_as_units,
    "sentence": sentences_as_units,
    "statement": statements_as_units,
}


def _in_tokens(text: TokenText, first: Sequence[int], after: Sequence[int]) -> Units:
    """Units given in characters; one in which no token begins is none, and of two from one token the later is kept."""
    N = len(text.begins) - 1
    starts, ends = text.tokens_at(first), text.tokens_at(after)
    starts, ends = starts[ends > starts], ends[ends > starts]
    apart = np.diff(starts, append=N) > 0
    return Units(starts[apart], ends[apart], N)
