"""--sfr-hf-load is `convert import` and --pretrained-checkpoint in one: the same losses and weights, bit for bit."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.hf.load_at_start import start_from
from tests import warm
from tests.distributed.launch import read_checkpoint, read_metrics, train
from tests.distributed.runs import Runs, begin_with
from tests.distributed.settings import EACH_STEP, PP2, SHARDED_OPTIMIZER, SP, TP2, VPP
from tests.distributed.tiny import write_recipe
from tests.hf.models import save_model

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "tied Qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "dtype": torch.bfloat16},
}
RUNS = {  # name: processes, model, flags
    "TP2, tied, sequence parallel": (2, "tied", (*TP2, SP)),
    "DP2, tied, bf16, distributed optimizer": (2, "tied Qwen2", ("--bf16", *SHARDED_OPTIMIZER)),
    "TP2 PP2": (4, "untied", (*TP2, *PP2)),
    "TP2 VPP, tied, bf16, distributed optimizer": (
        4,
        "tied Qwen2",
        (*TP2, *PP2, *VPP, "--bf16", *SHARDED_OPTIMIZER),
    ),
}


def model(runs: Runs, name: str) -> Path:
    """A folder with the model as Hugging Face saves it and, in megatron/, its import."""

    def make(folder: Path) -> None:
        save_model(folder / "hf", **MODELS[name])
        import_hf(folder / "hf", folder / "megatron", progress=False)

    return runs.once(f"start {name}", make)


def recipe(runs: Runs, name: str) -> Path:
    shape = {"qk_layernorm": False} | megatron_flags(read_config(model(runs, name) / "hf"))
    changes = shape | {"seq_length": 80, "exit_interval": 2}
    return runs.once(f"start {name}.yaml", lambda path: write_recipe(path, runs.prepared, **changes))


def imported(runs: Runs, run: str) -> Path:
    """Two steps of a layout from the imported checkpoint."""
    ranks, name, flags = RUNS[run]
    start = (*begin_with(model(runs, name) / "megatron"), "--sfr-fresh-head")
    return runs.train(f"{run} imported", ranks, *flags, *start, *EACH_STEP, recipe=recipe(runs, name))


def direct(runs: Runs, run: str) -> Path:
    """Two steps of a layout from the Hugging Face folder."""
    ranks, name, flags = RUNS[run]
    start = ("--sfr-hf-load", str(model(runs, name) / "hf"))
    return runs.train(f"{run} direct", ranks, *flags, *start, *EACH_STEP, recipe=recipe(runs, name))


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_it_is_what_an_imported_checkpoint_gives(runs, run):
    """Losses of both steps, and every tensor after each. Not exercised: Transformer Engine's layers."""
    both = imported(runs, run), direct(runs, run)
    expected, actual = map(read_metrics, both)
    assert len(expected) == 2
    assert [row["lm loss"] for row in actual] == [row["lm loss"] for row in expected]
    assert [row["sfr loss"] for row in actual] == [row["sfr loss"] for row in expected]
    for step in ("iter_0000001", "iter_0000002"):
        wanted, found = (read_checkpoint(path / step) for path in both)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name


@pytest.mark.distributed
def test_a_run_that_has_a_checkpoint_resumes_from_it(runs, tmp_path):
    """The Hugging Face folder need not even exist."""
    save = shutil.copytree(direct(runs, "TP2, tied, sequence parallel"), tmp_path / "run")
    start = ("--sfr-hf-load", str(tmp_path / "moved away"), "--exit-interval", "3")
    train(2, "--recipe", str(recipe(runs, "tied")), "--save", str(save), *TP2, SP, *start)
    assert [row["step"] for row in read_metrics(save)] == [1, 2, 3]


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
def test_flags_of_another_model_end_the_run_in_one_line(runs, flags, said):
    start = ("--recipe", str(recipe(runs, "untied")), "--sfr-hf-load", str(model(runs, "untied") / "hf"), *flags)
    done = warm.run("-m", "megatron_sfr.train", *start, ranks=1)
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
