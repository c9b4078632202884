"""--sfr-hf-load is `convert import` and --pretrained-checkpoint in one: the same losses and weights, bit for bit."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.hf.load_at_start import start_from
from tests.distributed.launch import read_checkpoint, read_metrics, torchrun, train_many
from tests.distributed.settings import PP2, SHARDED_OPTIMIZER, SP, TP2, VPP
from tests.distributed.tiny import recipe, write_prepared
from tests.hf.models import save_model

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "tied Qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "dtype": torch.bfloat16},
}
LAYOUTS = {
    2: {
        "TP2": ("untied", *TP2),
        "TP2, tied, sequence parallel": ("tied", *TP2, SP),
        "PP2, tied": ("tied", *PP2),
        "VPP": ("untied", *PP2, *VPP),
        "DP2, tied, bf16, distributed optimizer": ("tied Qwen2", "--bf16", *SHARDED_OPTIMIZER),
    },
    4: {
        "TP2 PP2": ("untied", *TP2, *PP2),
        "TP2 VPP, tied, bf16, distributed optimizer": ("tied Qwen2", *TP2, *PP2, *VPP, "--bf16", *SHARDED_OPTIMIZER),
    },
}
RUNS = {name: model for runs in LAYOUTS.values() for name, (model, *_) in runs.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps of each layout, started in both ways; NAME and NAME direct."""
    folder = tmp_path_factory.mktemp("hf-load")
    prepared = write_prepared(folder / "data")
    for name, options in MODELS.items():
        save_model(folder / name / "hf", **options)
        import_hf(folder / name / "hf", folder / name / "megatron", progress=False)
        shape = {"qk_layernorm": False} | megatron_flags(read_config(folder / name / "hf"))
        flags = recipe(prepared) | shape | {"seq_length": 80, "exit_interval": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(flags))
    for processes, runs in LAYOUTS.items():
        lists = []
        for run, (model, *layout) in runs.items():
            ways = {
                run: ("--pretrained-checkpoint", str(folder / model / "megatron"), "--sfr-fresh-head"),
                f"{run} direct": ("--sfr-hf-load", str(folder / model / "hf")),
            }
            for save, way in ways.items():
                named = ("--recipe", str(folder / f"{model}.yaml"), "--save", str(folder / save))
                lists.append([*named, *layout, *way, "--save-interval", "1"])
        if processes == 2:  # resumes from its own checkpoint, so the folder need not exist
            resumed = ("--sfr-hf-load", str(folder / "moved away"), "--exit-interval", "3")
            lists.append([*lists[1][:4], *TP2, *resumed, "--save-interval", "1"])
        train_many(processes, lists, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_it_is_what_an_imported_checkpoint_gives(trained, run):
    """Losses of both steps, and every tensor after each. Not exercised: Transformer Engine's layers."""
    imported, direct = (read_metrics(trained / name)[:2] for name in (run, f"{run} direct"))
    assert [row["lm loss"] for row in direct] == [row["lm loss"] for row in imported]
    assert [row["sfr loss"] for row in direct] == [row["sfr loss"] for row in imported]
    for step in ("iter_0000001", "iter_0000002"):
        wanted, found = (read_checkpoint(trained / name / step) for name in (run, f"{run} direct"))
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name


@pytest.mark.distributed
def test_a_run_that_has_a_checkpoint_goes_on_from_it(trained):
    assert [row["step"] for row in read_metrics(trained / "TP2 direct")] == [1, 2, 3]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--add-qkv-bias",),
            "has nothing for decoder.layers.self_attention.linear_qkv.bias, which these flags ask for",
        ),
        (("--ffn-hidden-size", "40"), "linear_fc1.weight is [88, 36], these flags build [80, 36]"),
        (("--num-layers", "3"), "the run has num_layers 3, but"),
    ],
)
def test_flags_of_another_model_end_the_run_in_one_line(trained, flags, said):
    start = ("--recipe", str(trained / "untied.yaml"), "--sfr-hf-load", str(trained / "untied" / "hf"), *flags)
    done = torchrun(1, "-m", "megatron_sfr.train", *start, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("megatron-sfr train: error:")]
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rotary_base": 10000}, "the run has rotary_base 10000, but .* means 50000: `megatron-sfr convert recipe"),
        ({"vocab_size": 500}, "--vocab-size 500 is less than the 503 of"),
    ],
)
def test_what_no_shape_shows_is_compared_with_the_config(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        start_from(save_model(tmp_path / "hf"), Namespace(**{"vocab_size": 503} | arguments))
