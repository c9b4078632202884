"""Phases A, B and C of the weight, at their boundaries."""

import pytest

from megatron_sfr.objectives.sfr.schedule import Phase, ScheduleOptions, phase_at

OPTIONS = {"warmup_steps": 10, "ramp_steps": 4}


@pytest.mark.parametrize(("warmup", "cross_entropy"), [("head_only", 0.0), ("detached", 1.0)])
def test_phase_a_trains_the_head_at_full_weight_on_detached_states(warmup: str, cross_entropy: float) -> None:
    options = ScheduleOptions(warmup=warmup, **OPTIONS)
    for step in (0, 9):
        assert phase_at(step, 100, options) == Phase(cross_entropy, 1.0, detach=True)


def test_phase_b_rises_from_0() -> None:
    phases = [phase_at(step, 100, ScheduleOptions(**OPTIONS)) for step in range(10, 15)]
    assert [p.share for p in phases] == [0, 0.25, 0.5, 0.75, 1]
    assert [p.detach for p in phases] == [True, False, False, False, False]
    assert {p.cross_entropy for p in phases} == {1.0}


@pytest.mark.parametrize(
    ("decay", "shares"), [("constant", (1, 1, 1)), ("linear", (1, 0.5, 0)), ("cosine", (1, 0.5, 0))]
)
def test_phase_c_decays_over_the_steps_that_remain(decay: str, shares: tuple[float, ...]) -> None:
    options = ScheduleOptions(decay=decay, **OPTIONS)
    actual = [phase_at(step, 114, options).share for step in (14, 64, 114)]
    assert actual == pytest.approx(shares)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [15, 114, 100_000])
def test_within_a_run_the_weight_is_0_only_at_the_first_step_of_the_ramp(decay: str, total: int) -> None:
    """A decay ends with the run: it would reach 0 at the step after the last one."""
    options = ScheduleOptions(decay=decay, **OPTIONS)
    assert [step for step in range(total) if phase_at(step, total, options).share == 0] == [10]
    assert (phase_at(total, total, options).share == 0) == (decay != "constant")


def test_weight_0_never_reaches_the_backbone() -> None:
    assert phase_at(50, 100, ScheduleOptions(weight=0.0)).detach


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": -1.0},
        {"warmup_steps": -1},
        {"weight_control": "ratio", "grad_ratio": 0.0},
        {"weight_control": "ratio", "measure_interval": 0},
    ],
)
def test_impossible_schedules_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"^`"):
        ScheduleOptions(**wrong)
