"""A resumed run equals an uninterrupted one: bit for bit in the same layout, to fp32's tolerance in another."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import EACH_STEP, HALFWAY, OVERLAPPED, PP2, RATIO, SHARDED_OPTIMIZER, SMOOTH, TEACHER, TP2, TWO_CLIPS
from .test_layouts import difference, trained

pytestmark = pytest.mark.distributed
GATE = ("--sfr-gate", "dynamic", "--sfr-gate-ratio", "1.01", "--sfr-gate-bins", "4")
WHITEN = ("--sfr-target-scale", "whiten", "--sfr-whiten", "ema")
RESUMES: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "dp2-buckets": (2, ("--use-distributed-optimizer",)),
    "dp2-sharded": (2, SHARDED_OPTIMIZER),
    "smooth-bf16-sharded": (2, ("--bf16", *SHARDED_OPTIMIZER, *OVERLAPPED, *SMOOTH)),
    "smooth-bf16-dp2": (2, ("--bf16", *SMOOTH)),
    "reference-bf16-sharded": (
        2,
        (
            *("--bf16", *SHARDED_OPTIMIZER, *OVERLAPPED),
            *("--sfr-preset", "reference", "--sfr-head-width", "24", *SMOOTH, "--sfr-ema-order", "before_step"),
        ),
    ),
    "teacher-pp2": (2, (*PP2, *TEACHER, *GATE, *WHITEN)),
}


def straight(runs: Runs, name: str) -> Path:
    """Four steps without a stop, with a checkpoint halfway."""
    ranks, flags = RESUMES[name]
    return runs.train(f"resume-{name}-straight", ranks, *RATIO, *HALFWAY, *flags)


@pytest.mark.parametrize("name", RESUMES)
def test_resumed_run_equals_the_straight_one_bit_for_bit(runs: Runs, name: str) -> None:
    ranks, flags = RESUMES[name]
    both = straight(runs, name), runs.resume(f"resume-{name}", straight(runs, name), 2, ranks, *RATIO, *flags)
    expected, resumed = (read_checkpoint(run / "iter_0000004") for run in both)
    assert expected.keys() == resumed.keys()
    # Upstream's gradient buckets have gaps between parameters that nobody writes: compare what they hold by its effect.
    named = [key for key in expected if not key.startswith("optimizer.distributed")]
    assert [key for key in named if not torch.equal(expected[key], resumed[key])] == []
    weights, resumed_weights = ([row["sfr weight"] for row in read_metrics(run)] for run in both)
    assert resumed_weights == weights
    assert weights[3] != weights[0]  # the adaptive weight moved, and came through the checkpoint


def test_tp2_checkpoint_resumes_as_pp2(runs: Runs) -> None:
    expected = runs.train("crossing-straight", 2, *RATIO, *HALFWAY, *TP2)
    crossing = runs.resume("crossing", expected, 2, 2, *RATIO, *PP2)
    straight, crossed = (read_checkpoint(run / "iter_0000004") for run in (expected, crossing))
    for prefix in ("decoder.", "embedding.", "output_layer.", "flow_head.", "optimizer.state.exp_avg."):
        assert difference(straight, crossed, prefix) < (1e-5, "")


def test_older_checkpoints_are_deleted_and_the_rest_is_the_same(runs: Runs) -> None:
    """Checkpoints of the steps 1 to 4, of which the newest is kept and that of step 2; the run resumes from them."""
    keep = ("--keep-checkpoints", "1", "--keep-every", "2", *EACH_STEP)
    kept = runs.train("keep-checkpoints", 1, *RATIO, *keep, stops=(3, 4))
    assert sorted(path.name for path in kept.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    expected, found = (read_checkpoint(run / "iter_0000004") for run in (straight(runs, "single"), kept))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_validating_between_steps_changes_nothing_and_is_logged(runs: Runs) -> None:
    validation = ("--valid-data-path", str(runs.prepared), "--eval-iters", "2", "--eval-interval", "1")
    validated = runs.train("validated", 1, *runs.start(), *TWO_CLIPS, *validation)
    single, other = (read_checkpoint(run / "iter_0000003") for run in (trained(runs, "single"), validated))
    assert all(torch.equal(single[key], other[key]) for key in single)
    rows = read_metrics(validated)
    assert [0 < row["lm loss validation"] < 7 and 1 < row["sfr loss validation"] < 3 for row in rows] == [True] * 3
