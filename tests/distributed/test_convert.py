"""Conversion through real layouts: what Megatron loads from an import and saves again exports to the same bits."""

from pathlib import Path

import pytest
import torch
import yaml

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import Weights, read_config
from megatron_sfr.hf.import_hf import import_hf
from tests.distributed.launch import train_many
from tests.distributed.tiny import recipe, write_prepared
from tests.hf.models import LLAMA3, save_model

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
DISTRIBUTED = {"use_distributed_optimizer": True}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
HEAD, NO_HEAD = {"sfr_fresh_head": True}, {"sfr": False}

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "tied bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "Qwen2, tied": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "Llama 3": {"architecture": "LlamaForCausalLM", "rope_parameters": LLAMA3},
    "Mistral 0.1": {"architecture": "MistralForCausalLM", "sliding_window": 17},
}
RUNS = {  # name: model, layout of four processes, whether a head is trained beside it
    "TP2 PP2": ("untied", TP2 | PP2 | HEAD),
    "TP2 PP2 without a head": ("untied", TP2 | PP2 | NO_HEAD),
    "VPP DP2, distributed optimizer": ("untied", VPP | DISTRIBUTED | HEAD),
    "TP2 PP2, tied": ("tied", TP2 | PP2 | HEAD),
    "TP2 DP2, tied, bf16, distributed optimizer": ("tied bf16", TP2 | DISTRIBUTED | NO_HEAD | {"bf16": True}),
    "TP2 PP2, Qwen2, tied": ("Qwen2, tied", TP2 | PP2 | HEAD),
    "TP2 PP2, Llama 3": ("Llama 3", TP2 | PP2 | HEAD),
    "VPP DP2, recomputed, Mistral 0.1": ("Mistral 0.1", VPP | RECOMPUTED | NO_HEAD),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Each run loads its imported model, takes one step of learning rate 0, which moves no weight, and saves."""
    folder = tmp_path_factory.mktemp("convert")
    prepared = write_prepared(folder / "data")
    for name, options in MODELS.items():
        save_model(folder / name / "hf", **options)
        import_hf(folder / name / "hf", folder / name / "megatron", progress=False)
    lists = []
    for i, (run, (model, layout)) in enumerate(RUNS.items()):
        start = {"load": str(folder / model / "megatron"), "finetune": True, "exit_on_missing_checkpoint": True}
        step = {"train_iters": 1, "lr": 0.0, "seq_length": 80, "save": str(folder / run)}
        shape = {"qk_layernorm": False} | megatron_flags(read_config(folder / model / "hf"))
        flags = recipe(prepared) | shape | start | step | layout
        (folder / f"{i}.yaml").write_text(yaml.safe_dump(flags))
        lists.append(["--recipe", str(folder / f"{i}.yaml")])
    train_many(4, lists, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_there_through_megatron_and_back_is_bit_equal(saved, run):
    """Not exercised: TE's layer spec, which writes the same keys but needs a GPU."""
    model, layout = RUNS[run]
    report = export_hf(saved / run, saved / f"{run} hf", like=saved / model / "hf", progress=False)
    found, wanted = Weights(saved / f"{run} hf"), Weights(saved / model / "hf")
    assert found.files.keys() == wanted.files.keys()
    for name in wanted.files:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name
    assert report.padding == 512 - 503
    assert bool(report.dropped) == ("sfr" not in layout)
    assert all(name.startswith("flow_head.") for name in report.dropped)


@pytest.mark.distributed
def test_an_export_for_another_config_is_refused(saved):
    """What shapes cannot show is in the arguments that Megatron keeps."""
    like = saved / "other"
    like.mkdir()
    config = (saved / "untied" / "hf" / "config.json").read_text()
    (like / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    with pytest.raises(ValueError, match="trained with norm_epsilon 1e-05, but the config means 1e-06"):
        export_hf(saved / "TP2 PP2", saved / "refused", like=like, progress=False)
    config = (saved / "Llama 3" / "hf" / "config.json").read_text()
    (like / "config.json").write_text(config.replace('"factor": 32.0', '"factor": 8.0'))
    with pytest.raises(ValueError, match=r"trained with rope_scaling_factor 32\.0, but the config means 8\.0"):
        export_hf(saved / "TP2 PP2, Llama 3", saved / "refused", like=like, progress=False)
