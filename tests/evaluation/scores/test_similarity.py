"""Similarity across models: every pair counts once, and samples of one index do not."""

import math

import numpy as np
import pytest

from megatron_sfr.evaluation.scores.diversity import embedding_spread
from megatron_sfr.evaluation.scores.similarity import similarity


def unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, 5))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 2), (1, 5)])
def test_it_is_the_mean_over_the_pairs(n: int, m: int) -> None:
    a, b = unit(n, 0), unit(m, 1)
    cosines = a @ b.T
    apart = ~np.eye(n, m, dtype=bool)
    assert similarity(a, b) == pytest.approx(cosines[apart].mean())
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    assert similarity(a, b, paired=False) == pytest.approx(cosines.mean())


def test_within_a_model_it_is_one_minus_the_spread() -> None:
    a = unit(6, 2)
    assert similarity(a, a) == pytest.approx(1 - embedding_spread(a))


def test_equal_models_are_as_similar_as_each_is_to_itself_in_expectation() -> None:
    a, b = unit(400, 3), unit(400, 4)
    assert similarity(a, b) == pytest.approx(similarity(a, a), abs=0.02)


def test_no_pair_has_no_value() -> None:
    empty = np.zeros((0, 5))
    assert all(
        math.isnan(similarity(*pair)) for pair in ((empty, empty), (unit(1, 0), unit(1, 1)), (unit(3, 0), empty))
    )
