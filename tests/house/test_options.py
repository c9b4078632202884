"""Each option of ours is explained, and is in a recipe that someone can run."""

import re
from pathlib import Path

import yaml

from megatron_sfr.config.settings import PARTS, PRESETS, Parser
from megatron_sfr.objectives.token.registry import LOSSES
from megatron_sfr.option_names import option_names

ROOT = Path(__file__).resolve().parents[2]
# What no recipe should say: a store other than the usual one, a fault, epochs where the recipe counts steps, a trace,
# a server.
NOT_IN_RECIPES = {"sfr_target_store", "sfr_target_dim", "train_epochs", "profile_steps"} | {
    *("sfr_fault_zero_targets", "sfr_fault_phase_a_lost"),
    *("mlflow_experiment", "mlflow_run_name"),
}


def options() -> set[str]:
    losses = [
        registered.loss for registered in LOSSES.values() if registered.loss.__module__.startswith("megatron_sfr")
    ]
    return {option for part in (*PARTS, *losses) for option in option_names(part).values()}


def test_every_option_has_a_help_text() -> None:
    actions = {action.dest: action for action in Parser()._actions}
    assert [name for name in options() if len(actions[name].help or "") < 20] == []


def test_every_option_is_in_a_recipe() -> None:
    recipes = [*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "megatron_sfr/demo/recipes").glob("*.yaml")]
    used = {key for path in recipes for key in yaml.safe_load(re.sub(r"\b[A-Z_]{4,}\b", "1", path.read_text()))}
    used |= {key.replace("-", "_") for preset in PRESETS.values() for key in preset}
    assert options() - used - NOT_IN_RECIPES == set()


def test_prefixes_are_for_flags_and_recipes_only() -> None:
    fields = [f"{part.__name__}.{field}" for part in PARTS for field in option_names(part)]
    assert [name for name in fields if re.search(r"\.(sfr|kl_flow)_", name)] == []
