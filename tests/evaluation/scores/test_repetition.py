"""Repetition: loops counted by hand and found by search."""

import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.scores.repetition import longest_loop, loop_share


def test_loops_counted_by_hand() -> None:
    assert longest_loop("") == longest_loop("one") == longest_loop("one two three") == 0
    assert longest_loop("no no") == 2
    assert longest_loop("well ha ha ha ha then") == 4
    assert longest_loop("so it goes so it goes so it") == 8  # the third block is cut off, and still counts
    assert longest_loop("a b c a b") == 0  # said again, but not in a row twice
    assert longest_loop("a b c d a b c d", longest_block=3) == 0


def test_the_share_counts_replies_over_the_threshold() -> None:
    assert loop_share(["ha " * 10, "ha " * 9, "all is well"], threshold=10) == 1 / 3
    assert math.isnan(loop_share([]))


def brute(words: list[str], longest_block: int) -> int:
    best = 0
    for start in range(len(words)):
        for end in range(start + 2, len(words) + 1):
            piece = words[start:end]
            periods = range(1, min(longest_block, len(piece) // 2) + 1)
            if any(all(piece[i] == piece[i - p] for i in range(p, len(piece))) for p in periods):
                best = max(best, len(piece))
    return best


@given(st.lists(st.sampled_from("ab"), max_size=14), st.integers(1, 4))
def test_the_longest_loop_is_found_by_looking_at_every_piece(words: list[str], longest_block: int) -> None:
    assert longest_loop(" ".join(words), longest_block) == brute(words, longest_block)
