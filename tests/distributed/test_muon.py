"""Upstream's Muon trains a denoiser, and a stopped run resumes exactly."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics, train
from .settings import KL_FLOW
from .tiny import write_prepared, write_recipe

pytestmark = pytest.mark.distributed


def test_muon_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", write_prepared(tmp_path / "data", rows=16), sfr=False)
    common = ["--recipe", str(recipe), *KL_FLOW, "--optimizer", "muon", "--lr", "2e-3", "--train-iters", "4"]
    common += ["--global-batch-size", "8"]
    train(1, *common, "--save", str(tmp_path / "straight"))
    for stop in ("2", "4"):
        train(1, *common, "--save", str(tmp_path / "stopped"), "--exit-interval", stop)
    straight, stopped = (read_checkpoint(tmp_path / name / "iter_0000004") for name in ("straight", "stopped"))
    assert [key for key in straight if not torch.equal(straight[key], stopped[key])] == []
    losses = [row["kl-flow loss"] for row in read_metrics(tmp_path / "straight")]
    assert losses[3] < losses[0] - 0.3
