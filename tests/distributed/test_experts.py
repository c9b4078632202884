"""Qwen3 with experts, trained for real: the same numbers for every layout of the experts, the same bits out as in."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import Weights, read_config
from megatron_sfr.hf.import_hf import import_hf
from tests.distributed.launch import read_checkpoint, read_metrics
from tests.distributed.runs import Runs, begin_with
from tests.distributed.settings import PP2, SHARDED_OPTIMIZER, SP, TP2
from tests.distributed.tiny import write_recipe
from tests.hf.models import save_model

EP2 = ("--expert-model-parallel-size", "2")
WHOLE = ("--expert-tensor-parallel-size", "1")
LAYOUTS = {  # name: processes, flags
    "single": (1, ()),
    "EP2, distributed optimizer": (2, (*EP2, *SHARDED_OPTIMIZER)),
    "TP2, SP": (2, (*TP2, SP)),
    "PP2 EP2": (4, (*PP2, *EP2)),
    "TP2 EP2, SP": (4, (*TP2, SP, *EP2, *WHOLE)),
}


def model(runs: Runs) -> Path:
    """A folder with the model as Hugging Face saves it and, in megatron/, its import."""

    def make(folder: Path) -> None:
        save_model(folder / "hf", "Qwen3MoeForCausalLM")
        import_hf(folder / "hf", folder / "megatron", progress=False)

    return runs.once("experts model", make)


def recipe(runs: Runs) -> Path:
    # The head's gradient is clipped well below adam_eps' reach, so that Adam does not magnify its rounding.
    changes = {"seq_length": 80, "train_iters": 2, "sfr_clip_grad": 0.01}
    flags = megatron_flags(read_config(model(runs) / "hf")) | changes
    return runs.once("experts.yaml", lambda path: write_recipe(path, runs.prepared, **flags))


def trained(runs: Runs, name: str) -> Path:
    """Two steps of a layout from the HF folder."""
    ranks, layout = LAYOUTS[name]
    start = ("--sfr-hf-load", str(model(runs) / "hf"))
    return runs.train(f"experts {name}", ranks, *start, *layout, recipe=recipe(runs))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_every_layout_trains_the_same(runs, name):
    """Losses and every weight after two steps, sequential experts, fp32. Not exercised: grouped experts (CUDA)."""
    both = [trained(runs, run) for run in (name, "single")]
    for found, wanted in zip(*map(read_metrics, both), strict=True):
        for term in ("lm loss", "sfr loss"):
            assert found[term] == pytest.approx(wanted[term], rel=1e-5)
    found, wanted = (read_checkpoint(run / "iter_0000002") for run in both)
    weights = [x for x in wanted if not x.startswith(("optimizer.", "chained_"))]
    assert any("experts" in x for x in weights)
    for x in weights:
        torch.testing.assert_close(found[x], wanted[x], rtol=1e-5, atol=1e-5 * wanted[x].abs().max().item(), msg=x)


@pytest.mark.distributed
def test_experts_there_through_megatron_and_back(runs, tmp_path):
    """A step of learning rate 0 from the imported checkpoint."""
    hf = model(runs) / "hf"
    start = (*begin_with(model(runs) / "megatron"), "--sfr-fresh-head", "--lr", "0", "--train-iters", "1")
    unmoved = runs.train("experts unmoved", 4, *start, *PP2, *EP2, recipe=recipe(runs))
    export_hf(unmoved, tmp_path / "back", like=hf, progress=False)
    found, wanted = Weights(tmp_path / "back"), Weights(hf)
    assert found.files.keys() == wanted.files.keys()
    assert all(torch.equal(found[x].view(torch.uint8), wanted[x].view(torch.uint8)) for x in wanted.files)
