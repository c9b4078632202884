"""Modes: clusters of known vectors, and their coverage against a search by hand."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.modes import mode_coverage, modes


def at(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_near_replies_are_one_mode_and_a_chain_is_one_too() -> None:
    references = at(0, 90, 40, 20, 180)  # 0-20-40 is a chain of steps of 20 degrees
    assert modes(references, math.cos(math.radians(25))).tolist() == [0, 1, 0, 0, 2]
    assert modes(references, math.cos(math.radians(1))).tolist() == [0, 1, 2, 3, 4]
    assert modes(references[:0]).tolist() == []


def test_coverage_counts_modes_not_replies() -> None:
    references, threshold = at(0, 20, 40, 90, 180), math.cos(math.radians(25))
    assert mode_coverage(at(0, 30), references, threshold) == 1 / 3  # both hit the chain
    assert mode_coverage(at(0, 100), references, threshold) == 2 / 3
    assert mode_coverage(at(135), references, threshold) == 0
    assert mode_coverage(references, references, threshold) == 1
    assert math.isnan(mode_coverage(references[:0], references))
    assert math.isnan(mode_coverage(references, references[:0]))


@given(st.integers(1, 12), st.integers(0, 5000), st.floats(-0.5, 0.99))
def test_modes_are_the_components_of_the_graph(m: int, seed: int, threshold: float) -> None:
    references = at(*np.random.default_rng(seed).uniform(0, 360, m))
    found = modes(references, threshold)
    component = {i: {i} for i in range(m)}
    for i in range(m):
        for j in range(i):
            if references[i] @ references[j] >= threshold:
                merged = component[i] | component[j]
                component |= dict.fromkeys(merged, merged)
    assert [set(np.flatnonzero(found == found[i])) for i in range(m)] == [component[i] for i in range(m)]
