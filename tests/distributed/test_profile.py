"""A trace of two steps, with the ranges of the forward step; also of a run that has resumed."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_sfr.training.auxiliary_loss import TARGETS
from megatron_sfr.training.forward_step import BACKBONE, HEAD, LOSS

from .runs import Runs
from .settings import PP2

pytestmark = pytest.mark.distributed
STEPS = ("--profile-steps", "3:5", "--train-iters", "6")


def ranges(trace: Path) -> Counter[str]:
    """How often each range is in a trace."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_the_trace_has_the_ranges_of_each_microbatch(runs: Runs) -> None:
    """Two steps of two microbatches; the first stage has the backbone alone."""
    save = runs.train("profiled", 2, *PP2, *STEPS)
    first, last = (ranges(save / f"torch_profile/rank-{rank}.json.gz") for rank in (0, 1))
    assert [first[name] for name in (BACKBONE, LOSS, HEAD, TARGETS)] == [4, 0, 0, 0]
    assert [last[name] for name in (BACKBONE, LOSS, HEAD)] == [4, 4, 4]
    assert last[TARGETS] >= 4
    assert {f"ProfilerStep#{step}" for step in (3, 4)} <= last.keys()


def test_a_resumed_run_traces_the_same_steps(runs: Runs) -> None:
    """Stopped after the second step, so that the profiler's first step is the third."""
    save = runs.train("profiled-resumed", 1, *STEPS, stops=(2, 6))
    assert ranges(save / "torch_profile/rank-0.json.gz")[LOSS] == 4
