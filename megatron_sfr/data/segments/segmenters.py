"""Segmenters divide a reply into units. Horizons say which units ahead of an anchor are its targets.

A horizon is (offset, length). By default it counts tokens, offset 1 being the token to predict next; (1, 256) is the
paper's. With another segmenter it counts sentences or statements, offset 1 being the next one to start. (0, 0), written
`reply`, is the whole reply: the same target at each of its anchors, with the tokens before the anchor in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_sfr.data.segments.sentences import sentence_starts
from megatron_sfr.data.segments.statements import statements
from megatron_sfr.data.segments.token_text import TokenText

Segmenter = Literal["window", "sentence", "statement"]
Horizon = tuple[int, int]
DEFAULTS: dict[Segmenter, Horizon] = {"window": (1, 256), "sentence": (1, 1), "statement": (1, 1)}
MOST_HORIZONS = 16
WHOLE_REPLY: Horizon = (0, 0)
REPLY = "reply"


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


@dataclass(frozen=True)
class TokenUnits:
    """Units that are the N tokens themselves."""

    N: int

    def ahead(self, anchors: np.ndarray, offset: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Units.ahead`."""
        start = np.minimum(anchors + (offset - 1), self.N)
        end = start + length
        return start, np.minimum(end, self.N), end <= self.N


def _steps(follows: np.ndarray, steps: int) -> np.ndarray:
    """The unit reached from each one [U + 1] after `steps` steps, by doubling: O(U log steps)."""
    reached = np.arange(len(follows))
    steps = min(steps, len(follows))
    while steps:
        if steps & 1:
            reached = follows[reached]
        follows, steps = follows[follows], steps >> 1
    return reached


def tokens_as_units(text: TokenText) -> TokenUnits:
    return TokenUnits(len(text.begins) - 1)


def sentences_as_units(text: TokenText) -> Units:
    """Sentences. A token belongs to the sentence that contains its first byte."""
    starts = sentence_starts(text.text)
    return _in_tokens(text, starts, [*starts[1:], len(text.text)])


def statements_as_units(text: TokenText) -> Units:
    """Statements. A token belongs to the statements that contain its first byte."""
    return _in_tokens(text, *statements(text.text))


SEGMENTERS: dict[Segmenter, Callable[[TokenText], Units | TokenUnits]] = {
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


def parse_horizons(texts: Iterable[str]) -> tuple[Horizon, ...]:
    """Horizons written as OFFSET:LENGTH or `reply`; ValueError for others, and for what `check_horizons` refuses."""
    horizons = []
    for text in texts:
        if text == REPLY:
            horizons.append(WHOLE_REPLY)
            continue
        numbers = re.fullmatch(r"(-?[0-9]{1,9}):(-?[0-9]{1,9})", text)
        if numbers is None:
            raise ValueError(
                f"horizon {text!r} is not OFFSET:LENGTH; give two whole numbers, such as 1:256, or {REPLY}"
            )
        horizons.append((int(numbers[1]), int(numbers[2])))
    check_horizons(horizons)
    return tuple(horizons)


def check_horizons(horizons: Sequence[Horizon]) -> None:
    """ValueError for horizons that mean nothing, or the same twice."""
    if not 1 <= len(horizons) <= MOST_HORIZONS:
        raise ValueError(f"{len(horizons)} horizons; give 1 to {MOST_HORIZONS} of them, such as 1:256")
    for number, (offset, length) in enumerate(horizons):
        text = format_horizons([(offset, length)])
        if offset < 1 and not is_whole_reply((offset, length)):
            raise ValueError(f"horizon {text} begins before the token to predict; give an offset of at least 1")
        if length < 1 and not is_whole_reply((offset, length)):
            raise ValueError(f"horizon {text} holds nothing; give a length of at least 1")
        if (offset, length) in horizons[:number]:
            raise ValueError(f"horizon {text} is given twice; give each horizon once")


def is_whole_reply(horizon: Sequence[int]) -> bool:
    """Whether a horizon is the whole reply."""
    return tuple(horizon) == WHOLE_REPLY


def format_horizons(horizons: Iterable[Sequence[int]]) -> str:
    """As `parse_horizons` reads them, with blanks between."""
    return " ".join(REPLY if is_whole_reply(horizon) else f"{horizon[0]}:{horizon[1]}" for horizon in horizons)
