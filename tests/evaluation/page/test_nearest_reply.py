"""The nearest real reply: by cosine where there are vectors, by the share of common words otherwise."""

from collections import Counter

import numpy as np
import pytest

from megatron_sfr.evaluation.page.nearest_reply import (
    MOST,
    RealReplies,
    nearest_by_vector,
    nearest_by_words,
    words_of,
)


def test_by_vector_the_largest_cosine_is_nearest() -> None:
    references = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    near = nearest_by_vector(np.array([0.0, 1.0]), references)
    assert near is not None
    assert (near.index, near.similarity) == (1, 0.8)
    assert nearest_by_vector(np.ones(2), np.zeros((0, 2))) is None


def test_by_words_counts_matter_and_length_costs() -> None:
    words = Counter("a a b".split())
    near = nearest_by_words(words, [Counter("a b c c c".split()), Counter("a a".split()), Counter("c")])
    assert near is not None
    assert (near.index, near.similarity) == (1, pytest.approx(2 * 2 / 5))
    assert nearest_by_words(words, [Counter("c")]) is None
    assert nearest_by_words(words, []) is None
    assert nearest_by_words(Counter(), [Counter()]) is None


def test_words_have_neither_case_nor_punctuation() -> None:
    assert words_of('The "Sea" -- the sea!', "13a") == Counter({"the": 2, "sea": 2})
    assert words_of("海は青い。", "char") == Counter("海は青い")


def test_many_real_replies_are_thinned_out_evenly() -> None:
    real = RealReplies([("poet", f"w{i}") for i in range(3 * MOST)], "13a")
    assert (real.known, len(real.spoken)) == (3 * MOST, MOST)
    assert real.spoken[1] == ("poet", "w3")
    near = real.nearest("w6", None)
    assert near is not None
    assert real.spoken[near.index] == ("poet", "w6")


def test_vectors_are_compared_where_there_are_some() -> None:
    """The text would be nearest to the first reply by words."""
    real = RealReplies([("poet", "salt"), ("cook", "rain")], "13a", np.eye(2))
    near = real.nearest("salt", np.array([0.6, 0.8]))
    assert near is not None
    assert (real.spoken[near.index], near.similarity) == (("cook", "rain"), 0.8)
