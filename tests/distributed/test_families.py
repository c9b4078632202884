"""More families, started from Hugging Face weights over TP2 x PP2 with a flow head and exported: the same bits."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import Weights, read_config
from tests.distributed.launch import read_metrics
from tests.distributed.runs import Runs
from tests.distributed.tiny import write_recipe
from tests.hf.models import save_model

LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
EXPERTS = {"sequence_parallel": True, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
NEMOTRON_H = "NemotronHForCausalLM"
LAYERS = {NEMOTRON_H: {"hybrid_override_pattern": "*--*"}}
"""The layers of a tiny model that Megatron computes without a GPU, if its own have others."""
FAMILIES = {
    "GlmForCausalLM": {},
    "MixtralForCausalLM": EXPERTS,
    NEMOTRON_H: {"swiglu": False},
    "Phi3ForCausalLM": {},
    "Qwen2MoeForCausalLM": EXPERTS,
    "SeedOssForCausalLM": {},
    "SmolLM3ForCausalLM": {},
}


def trained(runs: Runs, name: str, hf: Path) -> Path:
    """A family takes one step of learning rate 0, which moves no weight, and saves."""
    shape = {"qk_layernorm": False} | megatron_flags(read_config(hf))
    changes = shape | {"seq_length": 80, "train_iters": 1, "lr": 0.0, "sfr_hf_load": str(hf)} | LAYOUT | FAMILIES[name]
    recipe = runs.once(f"{name}.yaml", lambda path: write_recipe(path, runs.prepared, **changes))
    return runs.train(name, 4, recipe=recipe)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILIES)
def test_there_through_megatron_and_back_is_bit_equal(runs: Runs, tmp_path: Path, name: str) -> None:
    """Not exercised: Transformer Engine's layers and grouped experts, which write the same keys, and Mamba layers: all
    need a GPU."""
    hf = save_model(tmp_path / "hf", name, **LAYERS.get(name, {}))
    run = trained(runs, name, hf)
    export_hf(run, tmp_path / "back", like=hf, progress=False)
    actual, expected = Weights(tmp_path / "back"), Weights(hf)
    assert actual.files.keys() == expected.files.keys()
    for key in expected.files:
        assert torch.equal(actual[key].view(torch.uint8), expected[key].view(torch.uint8)), key
    (metrics,) = read_metrics(run)
    assert 0 < metrics["sfr loss"] < 3
