"""Clusters and dispersion of vectors at known angles, single and batched, against a graph search."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.scores.clusters import clusters, spread


def at(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


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
