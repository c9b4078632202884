"""Recipes, flags and defaults become one set of arguments; what is wrong with them is said in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sfr.config import DEFAULTS, Parser, read_settings, to_flags

BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "micro_batch_size": 2,
    "train_iters": 5,
    "lr": 0.001,
    "vocab_size": 100,
    "train_data_path": ["data"],
    "sfr_backend": "cpu",
}


def write(folder: Path, **changes: Any) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | changes), encoding="utf-8")
    return ["--recipe", str(path)]


def test_flags_win_over_the_recipe_and_the_recipe_over_our_defaults(tmp_path: Path) -> None:
    recipe = read_settings([*write(tmp_path, **{"sfr-weight": 2.0, "hidden_dropout": 0.2}), "--sfr-weight", "3"]).recipe
    assert recipe["sfr_weight"] == 3.0
    assert recipe["hidden_dropout"] == 0.2
    assert recipe["attention_dropout"] == DEFAULTS["attention-dropout"]


def test_the_saved_recipe_reads_back_to_itself(tmp_path: Path) -> None:
    first = read_settings([*write(tmp_path, sfr=True, swiglu=True, save=str(tmp_path / "run")), "--bf16"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(first.recipe), encoding="utf-8")
    assert read_settings(["--recipe", str(saved)]).recipe == first.recipe
    assert first.recipe["load"] == first.recipe["save"]


def test_switches_lists_and_nulls() -> None:
    recipe = {"swiglu": True, "bf16": False, "no_rope_fusion": True, "bias_gelu_fusion": False, "seed": None}
    flags = to_flags(recipe | {"train_data_path": [0.3, "a", 0.7, "b"]}, Parser())
    assert flags == [
        "--swiglu",
        "--no-rope-fusion",
        "--no-bias-gelu-fusion",
        *("--train-data-path", "0.3", "a", "0.7", "b"),
    ]


def test_cpu_changes_are_said(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, transformer_impl="transformer_engine"))
    assert settings.backend == "cpu"
    assert "transformer_impl: transformer_engine -> local" in settings.changes


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"sfr_wieght": 1.0}, [], r"recipe.yaml: unknown key 'sfr-wieght'; did you mean sfr_weight\?"),
        ({}, ["--tensor-model-paralel-size", "2"], r"did you mean --tensor-model-parallel-size\?"),
        ({"swiglu": "yes please"}, [], "neither true nor false"),
        ({"sfr": {"weight": 1}}, [], "recipes are flat"),
        ({"train_iters": "many"}, [], "invalid int value"),
        ({"fp8_format": "hybrid"}, [], "FP8 needs Transformer Engine on CUDA"),
        ({"context_parallel_size": 2}, [], "context parallelism needs Transformer Engine"),
        ({"sfr": True, "sfr_draws": 0}, [], "sfr_draws = 0"),
        ({"sfr_fresh_head": True}, [], "goes with --load DIR --finetune"),
        ({"vocab_size": None}, [], "--vocab-size is missing"),
        ({"train_data_path": None}, [], "no training data"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, changes: dict, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_settings([*write(tmp_path, **changes), *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        read_settings(["--recipe", str(path)])
    with pytest.raises(ValueError, match="no such recipe"):
        read_settings(["--recipe", str(tmp_path / "absent.yaml")])
