"""How the values of a recipe are read, without Megatron."""

from pathlib import Path

import pytest

from megatron_sfr.config.recipe import check_recipes, read_recipe


def test_a_range_of_steps_is_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("profile_steps: 10:12\nseed: 7\nlr: 1.5\nsave: [-3, 0x10, 1_000]\n")
    expected = {"profile-steps": "10:12", "seed": 7, "lr": 1.5, "save": [-3, 16, 1000]}
    assert read_recipe(tmp_path / "recipe.yaml") == expected


def test_a_truth_value_is_not_taken_for_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("save: no\n")
    with pytest.raises(ValueError, match=r"save: False is not one value; .* in quotes where YAML takes it for true or"):
        check_recipes([tmp_path / "recipe.yaml"], [])
