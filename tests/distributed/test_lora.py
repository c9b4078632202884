"""LoRA trained for real: the same adapters for every layout, nothing moves in the base, and resumed runs are equal."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.model.lora.options import ADAPTER
from tests.hf.models import save_model

from .launch import read_checkpoint, read_metrics, train
from .runs import Runs
from .settings import HALFWAY, OVERLAPPED, PP2, RECOMPUTE, SHARDED_OPTIMIZER, SP, TP2, VPP
from .test_layouts import MOMENT, difference
from .tiny import write_recipe

pytestmark = pytest.mark.distributed
# adam_eps: at Adam's usual value rounding in the smallest of B's gradients would become whole steps.
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lr": 0.05, "adam_eps": 1e-2, "train_iters": 3}
EP2 = ("--expert-model-parallel-size", "2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: processes, flags
    "single": (1, ()),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-vpp-recompute": (2, (*PP2, *VPP, *RECOMPUTE)),
    "dp2-sharded": (2, (*SHARDED_OPTIMIZER, *OVERLAPPED)),
    "tp2-pp2-sp": (4, (*TP2, *PP2, SP)),
}
EXPERT_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "tp2-sp": (2, (*TP2, SP)),
    "pp2-ep2": (4, (*PP2, *EP2)),
}
MODELS = {"dense": "Qwen3ForCausalLM", "experts": "Qwen3MoeForCausalLM"}


def base(runs: Runs, model: str) -> Path:
    """The frozen model, as Hugging Face saves it."""
    return runs.once(f"lora base {model}", lambda folder: save_model(folder, MODELS[model]))


def recipe(runs: Runs, model: str, name: str = "", **changes: object) -> Path:
    """The recipe of a model, or another of that name with changes."""
    folder = base(runs, model)
    flags = {"qk_layernorm": False, **megatron_flags(read_config(folder)), "seq_length": 80, **LORA}
    flags |= {"sfr_hf_load": str(folder)} | changes
    return runs.once(f"lora {model}{name}.yaml", lambda path: write_recipe(path, runs.prepared, **flags))


def trained(runs: Runs, name: str, model: str = "dense") -> Path:
    """Three steps in a layout."""
    ranks, flags = (LAYOUTS if model == "dense" else EXPERT_LAYOUTS)[name]
    return runs.train(f"lora {model} {name}", ranks, "--save-interval", "1", *flags, recipe=recipe(runs, model))


def compare(runs: Runs, name: str, model: str) -> None:
    both = [trained(runs, run, model) for run in ("single", name)]
    for step in (1, 3):
        single, other = (read_checkpoint(run / f"iter_{step:07d}") for run in both)
        moments = {MOMENT, "chained_0.optimizer.state.exp_avg.", "chained_1.optimizer.state.exp_avg."}
        for prefix in (x for x in moments if any(key.startswith(x) for key in single)):
            assert difference(single, other, prefix) < (1e-5, "")
        assert difference(single, other, "decoder.") < (1e-5, "")
        assert difference(single, other, "flow_head.") < (1e-5, "")
    expected, found = map(read_metrics, both)
    for row, row_found in zip(expected, found, strict=True):
        terms = ("lm loss", "sfr loss", "sfr grad ratio", "grad-norm")
        assert [row_found[t] for t in terms] == pytest.approx([row[t] for t in terms], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_layout_changes_no_adapter(runs: Runs, name: str) -> None:
    """Gradients (Adam's moments), adapters, flow head and losses after one and three steps, fp32."""
    compare(runs, name, "dense")


@pytest.mark.parametrize("name", [name for name in EXPERT_LAYOUTS if name != "single"])
def test_layout_changes_no_adapter_of_an_expert(runs: Runs, name: str) -> None:
    compare(runs, name, "experts")


def test_checkpoint_holds_only_adapters_and_head(runs: Runs) -> None:
    checkpoint = read_checkpoint(trained(runs, "single") / "iter_0000003")
    weights = [key for key in checkpoint if not key.startswith("optimizer.")]
    assert all(ADAPTER in key or key.startswith("flow_head.") for key in weights)
    assert all(checkpoint[key].abs().max() > 0 for key in weights if ADAPTER in key)
    assert len([key for key in weights if ADAPTER in key]) == 8
    states = [key for key in checkpoint if key.startswith("optimizer.state")]
    assert all(ADAPTER in key or "flow_head." in key for key in states)


def test_resumed_run_equals_the_straight_one_bit_for_bit(runs: Runs) -> None:
    flags = ("--train-iters", "4", "--bf16", *PP2, *SHARDED_OPTIMIZER)
    straight = runs.train("lora straight", 2, *flags, *HALFWAY, recipe=recipe(runs, "dense"))
    resumed = runs.resume("lora resumed", straight, 2, 2, *flags, recipe=recipe(runs, "dense"))
    expected, found = (read_checkpoint(run / "iter_0000004") for run in (straight, resumed))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_dropout_changes_the_gradients(runs: Runs) -> None:
    """The output stays at first, as B is 0. Not exercised: a resumed run with dropout. On CPU, unlike on a GPU, torch's
    DataLoader draws from dropout's generator when a run starts."""
    dropped = runs.train("lora dropout", 1, "--train-iters", "1", "--lora-dropout", "0.5", recipe=recipe(runs, "dense"))
    single, other = trained(runs, "single"), dropped
    assert read_metrics(other)[0]["lm loss"] == read_metrics(single)[0]["lm loss"]
    both = [read_checkpoint(run / "iter_0000001") for run in (single, other)]
    assert difference(*both, MOMENT + "decoder.")[0] > 0.1


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown layer": (
        ("--lora-targets", "mlp.experts.*"),
        r"lora_targets: mlp\.experts\.\* matches none of this model's",
    ),
    "another rank": (("--lora-rank", "2", "--load", "{run}"), "holds adapters with lora_rank 4, this run has 2"),
    "another base": (("--sfr-hf-load", "{other}", "--load", "{run}"), "are not those that the run in .* has trained"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(runs: Runs, name: str, tmp_path: Path) -> None:
    flags, message = REFUSED[name]
    if "{other}" in flags:
        save_model(tmp_path / "other", MODELS["dense"], seed=1)
    places = {"{run}": str(trained(runs, "single")), "{other}": str(tmp_path / "other")}
    given = [places.get(flag, flag) for flag in flags]
    with pytest.raises(AssertionError, match=message):
        train(1, "--recipe", str(recipe(runs, "dense")), *given)
