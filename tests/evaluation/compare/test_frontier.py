"""Frontiers: values on a polyline, and gaps whose value is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.compare.frontier import best, bootstrap_gap, gap, shared_range

QUALITY = np.array([0.9, 0.8, 0.4])
DIVERSITY = np.array([0.2, 0.5, 0.7])


def test_best_is_the_most_diversity_at_no_less_quality() -> None:
    at = np.array([0.95, 0.9, 0.85, 0.8, 0.4, 0.1])
    np.testing.assert_allclose(
        best(QUALITY, DIVERSITY, at),
        [np.nan, 0.2, 0.35, 0.5, 0.7, 0.7],
        atol=0.005,  # read off points of the line
    )


def test_a_temperature_that_is_worse_on_both_axes_does_not_change_the_frontier() -> None:
    quality, diversity = np.append(QUALITY, 0.3), np.append(DIVERSITY, 0.1)
    assert best(quality, diversity, np.array([0.35]))[0] == pytest.approx(0.7)


@given(st.integers(0, 10_000), st.floats(-0.3, 0.3))
def test_a_curve_lifted_by_c_has_gap_c(seed: int, c: float) -> None:
    rng = np.random.default_rng(seed)
    quality, diversity = rng.uniform(size=4), rng.uniform(size=4)
    assert gap((quality, diversity), (quality, diversity + c)) == pytest.approx(c)
    assert gap((quality, diversity + c), (quality, diversity)) == pytest.approx(-c)


def test_sampling_the_same_line_at_other_temperatures_makes_no_difference() -> None:
    """A model that is only colder or warmer lies on the same frontier."""
    line = np.linspace(0.9, 0.3, 13)
    warmer, colder = line[[4, 8, 12]], line[[0, 4, 8]]
    assert gap((colder, 1 - colder), (warmer, 1 - warmer)) == pytest.approx(0, abs=1e-9)


def test_curves_without_a_common_quality_are_not_compared() -> None:
    low, high = shared_range(QUALITY, QUALITY - 0.8)
    assert low > high
    assert np.isnan(gap((QUALITY, DIVERSITY), (QUALITY - 0.8, DIVERSITY)))


def test_bootstrap_sees_a_gap_through_noise_that_both_share() -> None:
    """Prompts differ far more than the models do: resampling both together still finds the gap."""
    hard = np.random.default_rng(0).normal(0, 0.2, size=40)
    quality = QUALITY[:, None] + 0 * hard
    curve_a = (quality, DIVERSITY[:, None] + hard)
    curve_b = (quality, DIVERSITY[:, None] + hard + 0.03)
    found, reach = bootstrap_gap(curve_a, curve_b)
    assert reach == pytest.approx((0.4, 0.9))
    assert found.n == 40
    assert (found.mean, found.low, found.high) == pytest.approx((0.03, 0.03, 0.03))


def test_bootstrap_finds_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(1)
    a, b = ([line[:, None] + rng.normal(0, 0.05, (3, 40)) for line in (QUALITY, DIVERSITY)] for _ in range(2))
    found, _ = bootstrap_gap((a[0], a[1]), (b[0], b[1]))
    assert found.low < 0 < found.high


def test_prompts_missing_in_one_model_are_left_out_for_both() -> None:
    quality, diversity = np.tile(QUALITY[:, None], 5), np.tile(DIVERSITY[:, None], 5)
    holed = diversity.copy()
    holed[1, 2] = np.nan
    found, _ = bootstrap_gap((quality, diversity), (quality, holed))
    assert found.n == 4
    assert found.mean == pytest.approx(0)
