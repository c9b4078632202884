"""Which steps to trace, and what is refused because it would trace nothing."""

from argparse import Namespace

import pytest

from megatron_sfr.training.timing.profile import ProfileOptions, profile_flags

DEFAULTS = Namespace(profile_step_start=10, profile_step_end=12, train_iters=20, save="run", tensorboard_dir=None)


@pytest.mark.parametrize("steps", ["10", "10:10", "0:2", "12:10", "a:b", "1:2:3", "-1:2", ""])
def test_other_texts_than_first_and_end_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=r"`profile_steps` = .*: give FIRST:END, such as 10:12"):
        ProfileOptions(steps)


def test_megatrons_flags_follow() -> None:
    assert profile_flags(ProfileOptions(), DEFAULTS, DEFAULTS) == []
    flags = "--profile --use-pytorch-profiler --profile-step-start 3 --profile-step-end 5".split()
    assert profile_flags(ProfileOptions("3:5"), DEFAULTS, DEFAULTS) == flags
    again = Namespace(**vars(DEFAULTS) | {"profile_step_start": 3, "profile_step_end": 5})  # a resolved recipe
    assert profile_flags(ProfileOptions("3:5"), again, DEFAULTS) == flags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile_step_end": 7}, "profile_steps = 3:5 sets profile_step_end: leave profile_step_end out"),
        ({"train_iters": 4}, "the trace is written after step 5, and the run has 4"),
        ({"save": None}, "profile_steps writes its trace beside the run: set save"),
    ],
)
def test_what_would_trace_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_flags(ProfileOptions("3:5"), Namespace(**vars(DEFAULTS) | changes), DEFAULTS)
