"""A resumed run equals an uninterrupted one: bit for bit in the same layout, to fp32's tolerance in another."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics
from .settings import RESUMES
from .test_layouts import difference

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", [name for resumes in RESUMES.values() for name in resumes])
def test_resumed_run_equals_the_straight_one_bit_for_bit(runs: Path, name: str) -> None:
    straight, resumed = (read_checkpoint(runs / run / "iter_0000004") for run in (f"{name}-straight", name))
    assert straight.keys() == resumed.keys()
    # Upstream's gradient buckets have gaps between parameters that nobody writes: compare what they hold by its effect.
    named = [key for key in straight if not key.startswith("optimizer.distributed")]
    assert [key for key in named if not torch.equal(straight[key], resumed[key])] == []
    weights = [row["sfr weight"] for row in read_metrics(runs / name)]
    assert weights == [row["sfr weight"] for row in read_metrics(runs / f"{name}-straight")]
    assert weights[3] != weights[0]  # the steered weight moved, and came through the checkpoint


def test_tp2_checkpoint_resumes_as_pp2(runs: Path) -> None:
    straight, crossed = (read_checkpoint(runs / run / "iter_0000004") for run in ("crossing-straight", "crossing"))
    for prefix in ("decoder.", "embedding.", "output_layer.", "flow_head.", "optimizer.state.exp_avg."):
        assert difference(straight, crossed, prefix) < (1e-5, "")


def test_asynchronous_saving_writes_the_same_checkpoint(runs: Path) -> None:
    single, other = (read_checkpoint(runs / run / "iter_0000003") for run in ("single", "asynchronous"))
    assert all(torch.equal(single[key], other[key]) for key in single)


def test_validating_between_steps_changes_nothing_and_is_logged(runs: Path) -> None:
    single, other = (read_checkpoint(runs / run / "iter_0000003") for run in ("single", "validated"))
    assert all(torch.equal(single[key], other[key]) for key in single)
    rows = read_metrics(runs / "validated")
    assert [0 < row["lm loss validation"] < 7 and 1 < row["sfr loss validation"] < 3 for row in rows] == [True] * 3
