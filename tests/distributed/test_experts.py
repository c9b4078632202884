"""Qwen3 with experts, trained for real: the same numbers for every layout of the experts, the same bits out as in."""

from pathlib import Path

import pytest
import torch
import yaml

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import Weights, read_config
from megatron_sfr.hf.import_hf import import_hf
from tests.distributed.launch import read_checkpoint, read_metrics, train_many
from tests.distributed.settings import PP2, SHARDED_OPTIMIZER, SP, TP2
from tests.distributed.tiny import recipe, write_prepared
from tests.hf.models import save_model

EP2 = ("--expert-model-parallel-size", "2")
WHOLE = ("--expert-tensor-parallel-size", "1")
LAYOUTS = {
    1: {"single": ()},
    2: {"EP2": EP2, "EP2, distributed optimizer": (*EP2, *SHARDED_OPTIMIZER), "PP2": PP2, "TP2, SP": (*TP2, SP)},
    4: {"PP2 EP2": (*PP2, *EP2), "TP2 EP2, SP": (*TP2, SP, *EP2, *WHOLE)},
}
NAMES = [name for runs in LAYOUTS.values() for name in runs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps of each layout from the HF folder; a step of learning rate 0 from the imported checkpoint."""
    folder = tmp_path_factory.mktemp("experts")
    save_model(folder / "hf", "Qwen3MoeForCausalLM")
    import_hf(folder / "hf", folder / "megatron", progress=False)
    flags = recipe(write_prepared(folder / "data")) | megatron_flags(read_config(folder / "hf"))
    # The head's gradient is clipped well below adam_eps' reach, so that Adam does not magnify its rounding.
    flags |= {"seq_length": 80, "train_iters": 2, "sfr_clip_grad": 0.01}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(flags))
    for processes, runs in LAYOUTS.items():
        lists = []
        for name, layout in runs.items():
            lists.append(["--sfr-hf-load", str(folder / "hf"), "--save", str(folder / name), *layout])
        if processes == 4:
            start = (
                "--pretrained-checkpoint",
                str(folder / "megatron"),
                "--sfr-fresh-head",
                "--lr",
                "0",
                "--train-iters",
                "1",
            )
            lists.append([*start, "--save", str(folder / "unmoved"), *PP2, *EP2])
        train_many(processes, [["--recipe", str(folder / "recipe.yaml"), *x] for x in lists], folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_layout_trains_the_same(trained, name):
    """Losses and every weight after two steps, sequential experts, fp32. Not exercised: grouped experts (CUDA)."""
    for found, wanted in zip(read_metrics(trained / name), read_metrics(trained / "single"), strict=True):
        for term in ("lm loss", "sfr loss"):
            assert found[term] == pytest.approx(wanted[term], rel=1e-5)
    found, wanted = (read_checkpoint(trained / x / "iter_0000002") for x in (name, "single"))
    weights = [x for x in wanted if not x.startswith(("optimizer.", "chained_"))]
    assert any("experts" in x for x in weights)
    for x in weights:
        torch.testing.assert_close(found[x], wanted[x], rtol=1e-5, atol=1e-5 * wanted[x].abs().max().item(), msg=x)


@pytest.mark.distributed
def test_experts_there_through_megatron_and_back(trained):
    export_hf(trained / "unmoved", trained / "back", like=trained / "hf", progress=False)
    found, wanted = Weights(trained / "back"), Weights(trained / "hf")
    assert found.files.keys() == wanted.files.keys()
    assert all(torch.equal(found[x].view(torch.uint8), wanted[x].view(torch.uint8)) for x in wanted.files)
