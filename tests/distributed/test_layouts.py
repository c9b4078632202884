"""One global batch gives the same loss terms, gradients and weights however it and the model are split."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics
from .settings import LAYOUTS
from .tiny import VOCAB_SIZE

pytestmark = pytest.mark.distributed
TERMS = ("lm loss", "sfr loss", "sfr weight", "sfr grad ratio", "sfr grad signal", "grad-norm", "sfr head grad-norm")
# Adam's first moment after one step from zero is (1 - beta_1) times the gradient: every gradient is in the checkpoint.
MOMENT = "optimizer.state.exp_avg."


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str) -> tuple[float, str]:
    """Largest relative difference (by norms) among the tensors that a prefix names, and where it is."""
    worst = (0.0, "")
    names = [name for name in a if name.startswith(prefix) and "exp_avg_sq" not in name]
    assert names
    for name in names:
        x, y = a[name].double(), b[name].double()
        if x.shape != y.shape:  # the vocabulary's padding depends on the layout, and trains to nothing
            x, y = x[:VOCAB_SIZE], y[:VOCAB_SIZE]
        worst = max(worst, (((x - y).norm() / x.norm().clamp(min=1e-12)).item(), name))
    return worst


@pytest.mark.parametrize("name", [n for layouts in LAYOUTS.values() for n in layouts if n != "single"])
def test_layout_changes_no_number(runs: Path, name: str) -> None:
    for step in (1, 3):
        single, other = (read_checkpoint(runs / run / f"iter_{step:07d}") for run in ("single", name))
        if step == 1:
            assert difference(single, other, MOMENT) < (1e-5, "")
        for prefix in ("decoder.", "embedding.", "output_layer.", "flow_head."):
            assert difference(single, other, prefix) < (1e-5, "")
    expected, found = read_metrics(runs / "single"), read_metrics(runs / name)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(row["grad-norm"] > 0.5 and row["sfr head grad-norm"] > 0.1 for row in found)  # both are clipped
    for row, row_found in zip(expected, found, strict=True):
        assert [row_found[t] for t in TERMS] == pytest.approx([row[t] for t in TERMS], rel=1e-5)


@pytest.mark.parametrize("name", ["tied-pp2", "tied-tp2"])
def test_tied_embeddings_stay_tied_and_equal(runs: Path, name: str) -> None:
    one, other = (read_metrics(runs / run) for run in ("tied", name))
    checkpoint = read_checkpoint(runs / name / "iter_0000003")
    assert "output_layer.weight" not in checkpoint
    assert [row["step"] for row in other] == [1, 2, 3]
    assert other[0]["lm loss"] < one[0]["lm loss"]  # it went on from what the single process had learnt
    twin = "tied-tp2" if name == "tied-pp2" else "tied-pp2"
    assert difference(read_checkpoint(runs / twin / "iter_0000003"), checkpoint, "embedding.") < (1e-5, "")


def test_padded_vocabulary_gets_no_gradient(runs: Path) -> None:
    moment = read_checkpoint(runs / "tp2" / "iter_0000001")[f"{MOMENT}output_layer.weight"]
    assert len(moment) > VOCAB_SIZE
    assert not moment[VOCAB_SIZE:].any()
    assert moment[:VOCAB_SIZE].any(dim=1).all()
