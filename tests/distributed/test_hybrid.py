"""HybridModel trained for real: the numbers of GPTModel in every layout, and the same bits to Hugging Face and back."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import Weights, read_config
from megatron_sfr.hf.megatron.hybrid_names import hybrid_name

from .launch import read_checkpoint, read_metrics
from .runs import Runs, begin_with
from .settings import EACH_STEP, MICRO_BATCH_1, PP2, SP, TP2, TWO_CLIPS
from .test_convert import model
from .test_layouts import MOMENT, TERMS, difference, trained
from .tiny import write_recipe

pytestmark = pytest.mark.distributed
HYBRID = ("--model-class", "hybrid")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "tp2-sp": (2, (*TP2, SP)),
    "pp2": (2, PP2),
    "dp2": (2, MICRO_BATCH_1),
}
LAYERS = "decoder.layers."


def by_hybrid_names(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of GPTModel, which stacks its layers, under the names of HybridModel."""
    found = {}
    for name, x in checkpoint.items():
        if LAYERS in name:
            start, end = name.split(LAYERS)
            found |= {hybrid_name(f"{start}{LAYERS}{i}.{end}"): layer for i, layer in enumerate(x)}
        else:
            found[hybrid_name(name)] = x
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_gpt_model_on_one_process(runs: Runs, name: str) -> None:
    """Three steps from a checkpoint of GPTModel: losses, gradients (Adam's moments), weights, fp32.

    Not exercised: Transformer Engine's specification and Mamba layers, which need a GPU.
    """
    ranks, flags = LAYOUTS[name]
    hybrid = runs.train(f"hybrid {name}", ranks, *HYBRID, *runs.start(), *TWO_CLIPS, *EACH_STEP, *flags)
    gpt = trained(runs, "single")
    for step in (1, 3):
        expected, found = (read_checkpoint(run / f"iter_{step:07d}") for run in (gpt, hybrid))
        expected = by_hybrid_names(expected)
        assert f"{LAYERS}7.mlp.linear_fc2.weight" in expected.keys() & found.keys()
        assert "decoder.final_norm.weight" in expected.keys() & found.keys()
        if step == 1:
            assert difference(expected, found, MOMENT) < (1e-5, "")
        for prefix in ("decoder.", "embedding.", "output_layer.", "flow_head."):
            assert difference(expected, found, prefix) < (1e-5, "")
    for row, row_found in zip(*map(read_metrics, (gpt, hybrid)), strict=True):
        assert [row_found[t] for t in TERMS] == pytest.approx([row[t] for t in TERMS], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "start", "layout"), [("untied", "sfr_hf_load", (*TP2, SP)), ("tied", "pretrained_checkpoint", PP2)]
)
def test_from_hugging_face_and_back_is_bit_equal(
    runs: Runs, tmp_path: Path, name: str, start: str, layout: tuple[str, ...]
) -> None:
    """A step of learning rate 0, from the folder itself and from its import, which is a checkpoint of GPTModel."""
    folder = model(runs, name)
    hf = folder / "hf"
    shape = {"qk_layernorm": False} | megatron_flags(read_config(hf)) | {"seq_length": 80, "train_iters": 1, "lr": 0.0}
    recipe = runs.once(f"hybrid {name}.yaml", lambda path: write_recipe(path, runs.prepared, **shape))
    given = (
        ("--sfr-hf-load", str(hf)) if start == "sfr_hf_load" else (*begin_with(folder / "megatron"), "--sfr-fresh-head")
    )
    run = runs.train(f"hybrid {start}", 2, *HYBRID, *given, *layout, recipe=recipe)
    export_hf(run, tmp_path / "back", like=hf, progress=False)
    actual, expected = Weights(tmp_path / "back"), Weights(hf)
    assert actual.files.keys() == expected.files.keys()
    assert all(torch.equal(actual[x].view(torch.uint8), expected[x].view(torch.uint8)) for x in expected.files)
