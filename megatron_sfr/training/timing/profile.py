"""A trace of a few training steps by torch's profiler, through Megatron's own flags.

The ranges in it are those of the forward step and of the auxiliary loss.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, wrapper

UPSTREAMS = ("profile_step_start", "profile_step_end")


@dataclass(frozen=True)
class ProfileOptions:
    """Profiling of a few steps."""

    profile_steps: str | None = None
    """Steps to trace with torch's profiler, as FIRST:END, without END: '10:12' traces steps 10 and 11 and writes
    SAVE/torch_profile/rank-N.json.gz on each rank, or on those of --profile-ranks. Sets Megatron's profile,
    use_pytorch_profiler, profile_step_start and profile_step_end. Default: no trace."""

    def __post_init__(self) -> None:
        if self.profile_steps is None:
            return
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise ValueError(
                f"`profile_steps` = {self.profile_steps}: give FIRST:END, such as 10:12; steps count from 1"
            )

    @property
    def steps(self) -> tuple[int, int] | None:
        """First step and end."""
        if self.profile_steps is None:
            return None
        first, _, end = self.profile_steps.partition(":")
        return int(first), int(end)


def profile_flags(options: ProfileOptions, args: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """Megatron's flags for a trace.

    Args:
        args: the run's arguments, before Megatron checks them.
        defaults: those of a run without flags.
    Raises:
        ValueError: other flags ask for something else, or the trace would not be written.
    """
    if (steps := options.steps) is None:
        return []
    for name, step in zip(UPSTREAMS, steps, strict=True):
        if getattr(args, name) not in (step, getattr(defaults, name)):
            raise ValueError(f"profile_steps = {options.profile_steps} sets {name}: leave {name} out")
    if args.train_iters is not None and steps[1] > args.train_iters:
        raise ValueError(
            f"profile_steps = {options.profile_steps}: the trace is written after step {steps[1]}, and the run has "
            f"{args.train_iters}; give earlier steps"
        )
    if not (args.save or args.tensorboard_dir):
        raise ValueError("profile_steps writes its trace beside the run: set save")
    first, end = map(str, steps)
    return ["--profile", "--use-pytorch-profiler", "--profile-step-start", first, "--profile-step-end", end]


def replacements() -> tuple[Replacement, ...]:
    """The name of torch that is replaced while a run is profiled."""
    return (
        Replacement(
            "torch.profiler",
            "schedule",
            wrapper(_from_the_first_step),
            "Megatron's loop counts the steps to trace from where a process resumes, and its end from the first step",
        ),
    )


def _from_the_first_step(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """torch's schedule, for a profiler whose first step is the one at which the run resumes."""

    def counted(**options: Any) -> Callable[[int], Any]:
        from megatron.training.global_vars import get_args

        action, resumed = schedule(**options), int(get_args().iteration)
        return lambda step: action(step + resumed)

    return counted
