"""Modes: their coverage counted by hand."""

import math

import numpy as np

from megatron_sfr.evaluation.scores.modes import mode_coverage


def at(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_coverage_counts_modes_not_replies() -> None:
    references, threshold = at(0, 20, 40, 90, 180), math.cos(math.radians(25))
    assert mode_coverage(at(0, 30), references, threshold) == 1 / 3  # both hit the chain
    assert mode_coverage(at(0, 100), references, threshold) == 2 / 3
    assert mode_coverage(at(135), references, threshold) == 0
    assert mode_coverage(references, references, threshold) == 1
    assert math.isnan(mode_coverage(references[:0], references))
    assert math.isnan(mode_coverage(references, references[:0]))
