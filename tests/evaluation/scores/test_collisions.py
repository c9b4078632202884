"""Collisions, NoveltyBench's scores, semantic entropy and MMD against values worked out by hand."""

import math

import numpy as np
import pytest

from megatron_sfr.evaluation.scores.collisions import (
    collision_rate,
    distinct_k,
    novelty_classes,
    semantic_entropy,
    squared_mmd,
    utility_k,
)

A, B, C, D = np.eye(4)
NEAR_A = np.array([0.8, 0.6, 0.0, 0.0])  # cosine 0.8 to A, 0.6 to B


@pytest.mark.parametrize(
    ("vectors", "rate"),
    [([A, A], 1.0), ([A, B], 0.0), ([A, A, B, C], 1 / 6), ([A, NEAR_A, B], 1 / 3), ([A, A, A], 1.0)],
)
def test_collision_rate_counts_pairs(vectors: list[np.ndarray], rate: float) -> None:
    assert collision_rate(np.array(vectors)) == pytest.approx(rate)


def test_collision_rate_does_not_depend_on_the_number_of_texts() -> None:
    """The mean over draws equals sum of p^2, for two texts and for six."""
    p = np.array([0.5, 0.3, 0.2])
    rng = np.random.default_rng(0)
    for n in (2, 6):
        rates = [collision_rate(np.eye(3)[rng.choice(3, n, p=p)]) for _ in range(4000)]
        assert np.mean(rates) == pytest.approx(np.sum(p**2), abs=0.02)


def test_classes_are_found_in_order() -> None:
    assert novelty_classes(np.array([A, B, NEAR_A, C, B])) == [0, 1, 0, 2, 1]
    assert distinct_k(np.array([A, B, NEAR_A, C, B])) == 3
    between = np.array([0.75, 0.66, 0.0, 0.04]) / np.linalg.norm([0.75, 0.66, 0.0, 0.04])
    assert novelty_classes(np.array([B, A, between]), 0.6) == [0, 1, 1]  # near both: the nearest
    assert math.isnan(distinct_k(np.zeros((0, 4))))


def test_utility_discounts_and_pays_a_class_once() -> None:
    p = 0.8
    assert utility_k([0], [7.0]) == pytest.approx(7.0)
    assert utility_k([0, 0, 0], [7.0, 9.0, 9.0]) == pytest.approx(7 * (1 - p) / (1 - p**3))
    assert utility_k([0, 1, 0, 2], [1.0, 2.0, 3.0, 4.0]) == pytest.approx((1 - p) / (1 - p**4) * (1 + 2 * p + 4 * p**3))
    assert utility_k([0, 1, 2], [5.0, 5.0, 5.0]) == pytest.approx(5.0)  # all new and equal: their utility


def test_semantic_entropy_corrects_for_what_was_not_sampled() -> None:
    assert semantic_entropy(np.array([A, A, A])) == 0
    n, c = 4, 1 - 2 / 4  # A twice, B and C once
    q = np.array([2, 1, 1]) * c / n
    assert semantic_entropy(np.array([A, A, B, C])) == pytest.approx(-np.sum(q * np.log(q) / (1 - (1 - q) ** n)))
    uniform = np.tile(np.eye(4), (50, 1))
    assert semantic_entropy(uniform) == pytest.approx(math.log(4), rel=1e-6)
    plain = -sum(x * math.log(x) for x in (0.5, 0.25, 0.25))
    assert semantic_entropy(np.array([A, A, B, C])) > plain
    assert semantic_entropy(np.array([A, B, C, D])) > math.log(4)


def test_mmd_is_zero_in_expectation_for_one_distribution() -> None:
    rng = np.random.default_rng(1)

    def draw(n: int, shift: float) -> np.ndarray:
        x = rng.normal(size=(n, 8)) + shift * np.eye(8)[0]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    same = [squared_mmd(draw(5, 0.0), draw(3, 0.0)) for _ in range(1500)]
    assert np.mean(same) == pytest.approx(0, abs=4 * np.std(same) / len(same) ** 0.5)
    other = [squared_mmd(draw(5, 3.0), draw(3, 0.0)) for _ in range(50)]
    assert np.mean(other) > 0.1
    x, y = np.array([A, B]), np.array([C, C])
    k = math.exp(-1)
    assert squared_mmd(x, y) == pytest.approx(k + 1 - 2 * k)


@pytest.mark.parametrize("score", [collision_rate, distinct_k, semantic_entropy])
def test_there_is_no_value_without_texts(score) -> None:  # type: ignore[no-untyped-def]
    assert math.isnan(score(np.zeros((0, 4), np.float32)))
    assert math.isnan(squared_mmd(np.array([A]), np.array([A, B])))
