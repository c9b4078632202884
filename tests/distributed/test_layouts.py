"""One global batch gives the same loss terms, gradients and weights however it and the model are split."""

from pathlib import Path

import pytest
import torch

from .launch import read_checkpoint, read_metrics
from .runs import Runs, begin_with
from .settings import (
    EACH_STEP,
    MICRO_BATCH_1,
    MICRO_BATCH_4,
    OVERLAPPED,
    PP2,
    RECOMPUTE,
    SHARDED_OPTIMIZER,
    SP,
    TP2,
    TWO_CLIPS,
    VPP,
)
from .tiny import VOCAB_SIZE, write_recipe

pytestmark = pytest.mark.distributed
TERMS = ("lm loss", "sfr loss", "sfr weight", "sfr grad ratio", "sfr grad signal", "grad-norm", "sfr head grad-norm")
# Adam's first moment after one step from zero is (1 - beta_1) times the gradient: every gradient is in the checkpoint.
MOMENT = "optimizer.state.exp_avg."
TIED = {"untie_embeddings_and_output_weights": False}

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "micro-batch-4": (1, MICRO_BATCH_4),
    "recompute": (1, RECOMPUTE),
    "tp2-sp": (2, (*TP2, SP)),
    "pp2-vpp": (2, (*PP2, *VPP)),
    "dp2": (2, MICRO_BATCH_1),
    "dp2-sharded": (2, (*MICRO_BATCH_1, *SHARDED_OPTIMIZER, *OVERLAPPED)),
    "tp2-pp2": (4, (*TP2, *PP2)),
    "tp2-pp2-sp": (4, (*TP2, *PP2, SP)),
    "tp2-dp2-sharded": (4, (*TP2, *MICRO_BATCH_1, *SHARDED_OPTIMIZER)),
}


def trained(runs: Runs, name: str) -> Path:
    """Three steps in a layout, from the weights that all layouts start with."""
    ranks, flags = LAYOUTS[name]
    return runs.train(name, ranks, *runs.start(), *TWO_CLIPS, *EACH_STEP, *flags)


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


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_layout_changes_no_number(runs: Runs, name: str) -> None:
    both = [trained(runs, run) for run in ("single", name)]
    for step in (1, 3):
        single, other = (read_checkpoint(run / f"iter_{step:07d}") for run in both)
        if step == 1:
            assert difference(single, other, MOMENT) < (1e-5, "")
        for prefix in ("decoder.", "embedding.", "output_layer.", "flow_head."):
            assert difference(single, other, prefix) < (1e-5, "")
    expected, found = map(read_metrics, both)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(row["grad-norm"] > 0.5 and row["sfr head grad-norm"] > 0.1 for row in found)  # both are clipped
    for row, row_found in zip(expected, found, strict=True):
        assert [row_found[t] for t in TERMS] == pytest.approx([row[t] for t in TERMS], rel=1e-5)


@pytest.mark.parametrize("name", ["pp2", "tp2"])
def test_tied_embeddings_stay_tied_and_equal(runs: Runs, name: str) -> None:
    """Each layout trains three steps more than the single process has."""
    recipe = runs.once("tied.yaml", lambda path: write_recipe(path, runs.prepared, **TIED))
    single = runs.train("tied", 1, recipe=recipe)

    def tied(layout: str) -> Path:
        flags = {"pp2": PP2, "tp2": TP2}[layout]
        return runs.train(f"tied-{layout}", 2, *begin_with(single), *flags, recipe=recipe)

    one, other = read_metrics(single), read_metrics(tied(name))
    checkpoint = read_checkpoint(tied(name) / "iter_0000003")
    assert "output_layer.weight" not in checkpoint
    assert [row["step"] for row in other] == [1, 2, 3]
    assert other[0]["lm loss"] < one[0]["lm loss"]
    twin = tied("tp2" if name == "pp2" else "pp2")
    assert difference(read_checkpoint(twin / "iter_0000003"), checkpoint, "embedding.") < (1e-5, "")


def test_padded_vocabulary_gets_no_gradient(runs: Runs) -> None:
    moment = read_checkpoint(trained(runs, "tp2-sp") / "iter_0000001")[f"{MOMENT}output_layer.weight"]
    assert len(moment) > VOCAB_SIZE
    assert not moment[VOCAB_SIZE:].any()
    assert moment[:VOCAB_SIZE].any(dim=1).all()
