"""Bootstrap intervals: correct for known distributions, and without a value if data are missing."""

import math

import numpy as np
import pytest

from megatron_sfr.evaluation.scores.bootstrap import estimate, ratio


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    found = estimate(values)
    error = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(4)
    found = [estimate(rng.exponential(size=60)) for _ in range(200)]
    assert 0.88 < np.mean([e.low <= 1 <= e.high for e in found]) < 0.98  # 95 % less what a skew costs at n = 60


def test_prompts_without_a_value_are_left_out_and_not_counted() -> None:
    found = estimate(np.array([1.0, np.nan, 3.0]))
    assert (found.mean, found.n) == (2.0, 2)
    assert estimate(np.array([np.nan])).n == 0


def test_weights_make_it_a_ratio_of_sums() -> None:
    nll, tokens = np.array([2.0, 30.0]), np.array([1.0, 10.0])
    assert estimate(nll / tokens, tokens).mean == pytest.approx(32 / 11)


def test_a_ratio_is_of_means_and_resamples_both_together() -> None:
    base = np.array([0.0, 0.2, 0.4, np.nan])
    found = ratio(2 * base, base)
    assert (found.mean, found.n) == (pytest.approx(2.0), 3)
    assert (found.low, found.high) == (
        pytest.approx(2.0),
        pytest.approx(2.0),
    )
    assert ratio(np.array([1.0, 2.0]), np.zeros(2)).n == 0
    mixed = ratio(np.array([0.0, 0.3, 0.6]), np.array([0.3, 0.3, 0.3]))
    assert mixed.mean == pytest.approx(1.0)
    assert mixed.low < 1 < mixed.high
