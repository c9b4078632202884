"""Scores of vectors at known angles, single and batched, against sums over pairs, eigenvalues and a graph search."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.scores.embeddings import clusters, mode_coverage, similarity, spread, vendi_score


def at(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, 5))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vendi_counts_what_is_different() -> None:
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.tile(np.eye(3)[:1], (7, 1))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3)  # three texts, each said four times
    cosine = 0.6  # eigenvalues (1 + c) / 2 and (1 - c) / 2
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert vendi_score(np.array([[1, 0], [cosine, 0.8]])) == pytest.approx(math.exp(entropy))
    assert math.isnan(vendi_score(np.zeros((0, 3))))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 1000))
def test_vendi_lies_between_1_and_n_and_never_above_the_dimension(n: int, dim: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(n, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvals(vectors @ vectors.T / n).real
    brute = np.exp(-sum(value * np.log(value) for value in eigenvalues if value > 1e-12))
    assert vendi_score(vectors) == pytest.approx(brute)
    assert 1 - 1e-9 <= vendi_score(vectors) <= min(n, dim) + 1e-9


@given(st.integers(2, 6), st.integers(0, 1000))
def test_spread_is_the_mean_over_pairs(n: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(n, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - vectors[i] @ vectors[j] for i in range(n) for j in range(n) if i != j]
    assert spread(vectors) == pytest.approx(np.mean(pairs))
    assert math.isnan(spread(vectors[:1]))


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 2), (1, 5)])
def test_similarity_is_the_mean_over_the_pairs(n: int, m: int) -> None:
    a, b = unit(n, 0), unit(m, 1)
    cosines = a @ b.T
    apart = ~np.eye(n, m, dtype=bool)
    assert similarity(a, b) == pytest.approx(cosines[apart].mean())
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    assert similarity(a, b, paired=False) == pytest.approx(cosines.mean())


def test_similarity_within_a_model_is_one_minus_the_spread() -> None:
    a = unit(6, 2)
    assert similarity(a, a) == pytest.approx(1 - spread(a))


def test_equal_models_are_as_similar_as_each_is_to_itself_in_expectation() -> None:
    a, b = unit(400, 3), unit(400, 4)
    assert similarity(a, b) == pytest.approx(similarity(a, a), abs=0.02)


def test_without_a_pair_there_is_no_similarity() -> None:
    empty = np.zeros((0, 5))
    assert all(
        math.isnan(similarity(*pair)) for pair in ((empty, empty), (unit(1, 0), unit(1, 1)), (unit(3, 0), empty))
    )


def test_near_vectors_are_one_cluster_and_a_chain_is_one_too() -> None:
    vectors = at(0, 90, 40, 20, 180)  # 0-20-40 is a chain of steps of 20 degrees
    assert clusters(vectors, math.cos(math.radians(25))).tolist() == [0, 1, 0, 0, 4]
    assert clusters(vectors, math.cos(math.radians(1))).tolist() == [0, 1, 2, 3, 4]
    assert clusters(vectors[:0], 0.5).tolist() == []


@given(st.integers(1, 12), st.integers(0, 5000), st.floats(-0.5, 0.99))
def test_clusters_are_the_components_of_the_graph(n: int, seed: int, threshold: float) -> None:
    vectors = at(*np.random.default_rng(seed).uniform(0, 360, n))
    component = {i: {i} for i in range(n)}
    for i in range(n):
        for j in range(i):
            if vectors[i] @ vectors[j] >= threshold:
                merged = component[i] | component[j]
                component |= dict.fromkeys(merged, merged)
    assert clusters(vectors, threshold).tolist() == [min(component[i]) for i in range(n)]


def test_a_batch_equals_its_members() -> None:
    batch = np.stack([at(0, 10, 90, 95), at(5, 100, 200, 300), at(7, 7, 7, 7)])
    np.testing.assert_array_equal(clusters(batch, 0.9), [clusters(one, 0.9) for one in batch])
    np.testing.assert_array_equal(spread(batch), [spread(one) for one in batch])
    assert abs(spread(batch)[2]) < 1e-12
    assert np.isnan(spread(batch[:, :1])).all()


def test_coverage_counts_modes_not_replies() -> None:
    references, threshold = at(0, 20, 40, 90, 180), math.cos(math.radians(25))
    assert mode_coverage(at(0, 30), references, threshold) == 1 / 3  # both hit the chain
    assert mode_coverage(at(0, 100), references, threshold) == 2 / 3
    assert mode_coverage(at(135), references, threshold) == 0
    assert mode_coverage(references, references, threshold) == 1
    assert math.isnan(mode_coverage(references[:0], references))
    assert math.isnan(mode_coverage(references, references[:0]))
