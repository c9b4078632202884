"""Labels follow the rule, and the quantiles bound their number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.evaluation.lock_fork.labels import LabelOptions, label

ENTROPY = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 2.0, 3.0])
TOP = np.array([1.0, 0.8, 0.95, 0.95, 0.5, 0.5, 0.3, 0.2])
DISPERSION = np.array([0.0, 0.9, 0.1, 0.2, 0.9, 0.3, 0.4, 0.8])


def test_labels_by_hand() -> None:
    actual = label(ENTROPY, TOP, DISPERSION, LabelOptions())
    # entropy: quartiles .175 and 1.325; dispersion: upper quartile .825. The second has low entropy but a low top.
    assert actual.label.tolist() == ["lock", *["neutral"] * 7]
    wider = LabelOptions(fork_dispersion=0.5, lock_top=0.8)
    actual = label(ENTROPY, TOP, DISPERSION, wider)
    assert actual.label.tolist() == ["lock", "lock", *["neutral"] * 4, "fork", "fork"]
    assert "at most 0.175 nats and top-1 mass at least 0.8" in actual.rule
    assert "at least 1.33 nats and dispersion of the futures at least 0.35" in actual.rule


def test_without_a_head_entropy_decides_and_the_rule_reports_it() -> None:
    actual = label(ENTROPY, TOP, None, LabelOptions())
    assert (actual.label == "fork").sum() == 2
    assert "no flow head" in actual.rule


@given(st.integers(1, 60), st.integers(0, 999))
def test_no_more_than_the_quantiles_allow(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    entropy, top, dispersion = rng.gamma(1, size=n), rng.uniform(size=n), rng.uniform(size=n)
    actual = label(entropy, top, dispersion, LabelOptions())
    assert (actual.label == "lock").sum() <= np.ceil(n / 4) + 1
    assert (actual.label == "fork").sum() <= np.ceil(n / 4) + 1
    assert (entropy[actual.label == "lock"].max(initial=0) <= entropy[actual.label == "fork"].min(initial=np.inf)).all()


@pytest.mark.parametrize("wrong", [{"lock_top": 1.2}, {"lock_entropy": 0.8}, {"fork_dispersion": -0.1}])
def test_thresholds_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1|lower lock_entropy"):
        LabelOptions(**wrong)
