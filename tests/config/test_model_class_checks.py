"""Options of a hybrid model: its pattern from num_layers, what it does not support, and which checkpoints it loads."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sfr.config.model_class_checks import check_stored_model
from megatron_sfr.config.settings import read_settings

from .test_settings import write

HYBRID = {"model_class": "hybrid"}
MAMBA = {"model_class": "hybrid", "hybrid_layer_pattern": "M*-"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern for GPTModel": ({"hybrid_layer_pattern": "*-"}, "set model_class to hybrid, or leave it out"),
    "Megatron's old flag": ({"hybrid_override_pattern": "*-"}, "set model_class to hybrid and hybrid_layer_pattern"),
    "no layers": (HYBRID | {"num_layers": None}, "set num_layers, or hybrid_layer_pattern"),
    "uneven stages": (HYBRID | {"num_layers": 3, "pipeline_model_parallel_size": 2}, "with a | where a stage ends"),
    "KL-flow": (HYBRID | {"training_task": "kl-flow"}, "is for autoregressive training"),
    "scaled frequencies": (HYBRID | {"use_rope_scaling": True}, "HybridModel has no scaled rotary frequencies"),
    "layers without positions": (HYBRID | {"no_rope_freq": "4"}, "this option counts layers of GPTModel"),
    "prediction": (HYBRID | {"mtp_num_layers": 1}, "mtp_num_layers is not supported with model_class = hybrid"),
    "prediction in the pattern": (HYBRID | {"hybrid_layer_pattern": "*-/*-"}, "multi-token prediction"),
    "Mamba on a CPU": (
        MAMBA,
        r"pattern M\*-: Mamba layers \(M\) need a GPU and the packages mamba_ssm and causal_conv1d \(not installed: "
        r"mamba_ssm, causal_conv1d\): they cannot be trained on a CPU$",
    ),
    "gated delta net on a CPU": (
        HYBRID | {"hybrid_layer_pattern": "G-*-"},
        r"layers of gated delta net \(G\) need a GPU and the package fla \(not installed: fla\)",
    ),
    "experts without a number": (HYBRID | {"hybrid_layer_pattern": "*E"}, "set num_experts"),
    "experts on a CPU": (HYBRID | {"num_experts": 2}, "layers E need Transformer Engine or CUDA kernels"),
    "adapters": (HYBRID | {"lora_rank": 8}, "adapters were not tried with HybridModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, "*-*-"),
        ({"pipeline_model_parallel_size": 2}, "*-|*-"),
        ({"hybrid_layer_pattern": "*--"}, "*--"),
    ],
)
def test_the_layers_of_gpt_model_become_a_pattern(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    recipe = read_settings(write(tmp_path, **HYBRID | changes)).recipe
    assert recipe["hybrid_layer_pattern"] == pattern
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert read_settings(["--recipe", str(saved)]).recipe == recipe


@pytest.mark.parametrize(
    ("run", "stored", "message"),
    [
        (None, {"hybrid_layer_pattern": "*-*-"}, "this run has model_class gpt: set model_class to hybrid"),
        ("*-*-", {"hybrid_layer_pattern": "*--*"}, r"pattern \*--\*, this run has \*-\*-: set it to the same"),
        ("*--", {"num_layers": 1}, "holds a GPTModel, which does not fit this run: .*equal, nonzero number"),
        ("*-*-", {"hybrid_layer_pattern": "M-*-", "num_layers": 4}, r"pattern M-\*-, this run has \*-\*-"),
        ("*-*-", {"num_layers": 4}, r"a GPTModel of 4 layers, this run has hybrid_layer_pattern \*-\*- with 2"),
    ],
)
def test_a_checkpoint_of_other_layers_is_refused(run: str | None, stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stored_model(Namespace(hybrid_layer_pattern=run), "run", stored)


@pytest.mark.parametrize(
    ("run", "stored", "translated"),
    [
        (None, {"num_layers": 2}, False),
        (None, {}, False),
        ("*-|*-", {"hybrid_layer_pattern": "*-*-"}, False),
        ("*-*-", {"num_layers": 2, "hybrid_layer_pattern": None}, True),
        ("*-*-", {}, True),
    ],
)
def test_the_same_layers_load_in_any_stages_and_from_gpt_model(
    run: str | None, stored: dict[str, Any], translated: bool
) -> None:
    assert check_stored_model(Namespace(hybrid_layer_pattern=run), "run", stored) == translated
