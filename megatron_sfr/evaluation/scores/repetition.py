"""Repetition within replies, a sign of a broken model."""

from collections.abc import Sequence

import numpy as np

LONGEST_BLOCK = 32  # words
LOOP = 20  # smallest number of words in a loop


def longest_loop(text: str, longest_block: int = LONGEST_BLOCK) -> int:
    """Words in the longest run that repeats one block of at most `longest_block` words at least twice; 0 if none.

    A run has period p if w_i = w_(i - p) throughout. With r consecutive such words it is r + p words long, and it
    counts if r >= p.
    """
    words = text.split()
    ids = np.unique(words, return_inverse=True)[1] if words else np.zeros(0, int)
    loops = [0]
    for p in range(1, min(longest_block, len(ids) // 2) + 1):
        same = np.concatenate([[False], ids[p:] == ids[:-p], [False]])
        run = np.diff(np.flatnonzero(~same)).max() - 1  # consecutive words that equal the word p before
        loops.append(int(run) + p if run >= p else 0)
    return max(loops)


def loop_share(texts: Sequence[str], threshold: int = LOOP) -> float:
    """Share of texts whose longest loop has at least `threshold` words; NaN without texts."""
    return float(np.mean([longest_loop(text) >= threshold for text in texts])) if texts else float("nan")
