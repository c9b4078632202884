"""Horizons: the parts of a reply that an anchor has targets for; how they are written, checked and stored.

A horizon is (offset, length). By default it counts tokens, offset 1 being the token to predict next; (1, 256) is the
paper's. With another segmenter it counts sentences or statements, offset 1 being the next one to start. (0, 0), written
`reply`, is the whole reply: the same target at each of its anchors, with the tokens before the anchor in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import get_args

from megatron_sfr.data.segments.segmenters import Segmenter

Horizon = tuple[int, int]
DEFAULTS: dict[Segmenter, Horizon] = {"window": (1, 256), "sentence": (1, 1), "statement": (1, 1)}
MOST_HORIZONS = 16
WHOLE_REPLY: Horizon = (0, 0)
REPLY = "reply"


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


def check_segmenter(segmenter: str) -> None:
    """ValueError for one that there is not."""
    if segmenter not in get_args(Segmenter):
        raise ValueError(f"segmenter {segmenter!r} is unknown; choose from {', '.join(get_args(Segmenter))}")


def format_horizons(horizons: Iterable[Sequence[int]]) -> str:
    """As `parse_horizons` reads them, with blanks between."""
    return " ".join(REPLY if is_whole_reply(horizon) else f"{horizon[0]}:{horizon[1]}" for horizon in horizons)
