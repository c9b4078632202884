"""Krippendorff's alpha against his published example, and its limits."""

import math

import numpy as np
import pytest

from megatron_sfr.evaluation.judge.agreement import krippendorff_alpha

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section E: four observers, twelve units.
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_the_published_example() -> None:
    """He gives 0.849 for interval data."""
    units = [[float(x) for x in unit if x != "."] for unit in zip(*map(str.split, OBSERVERS), strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.849, abs=5e-4)


def test_the_definition_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    units = [rng.integers(1, 6, size=rng.integers(1, 5)).astype(float).tolist() for _ in range(30)]
    paired = [unit for unit in units if len(unit) > 1]
    every = [vote for unit in paired for vote in unit]
    observed = sum((a - b) ** 2 / (len(unit) - 1) for unit in paired for a in unit for b in unit) / len(every)
    expected = sum((a - b) ** 2 for a in every for b in every) / (len(every) * (len(every) - 1))
    assert krippendorff_alpha(units) == pytest.approx(1 - observed / expected, rel=1e-12)


def test_limits() -> None:
    assert krippendorff_alpha([[1, 1], [5, 5], [3, 3, 3]]) == 1
    assert krippendorff_alpha([[1, 5], [5, 1]]) < 0
    assert math.isnan(krippendorff_alpha([[4, 4], [4, 4, 4]]))
    assert math.isnan(krippendorff_alpha([[4], []]))
