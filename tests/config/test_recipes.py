"""How a recipe is read: numbers, text, paths below home; and what is wrong with it though each option is known."""

from pathlib import Path

import pytest

from megatron_sfr.config.recipe import check_recipes, read_recipe
from megatron_sfr.config.resume import DATA, HALF, LAYOUT, SCHEDULE, STATE
from megatron_sfr.config.settings import flag_parser, read_settings
from tests.config.test_settings import write


def test_options_of_sfr_need_a_run_that_says_whether_it_trains_with_sfr(tmp_path: Path) -> None:
    """Otherwise a recipe without its `sfr: true` would train with cross-entropy alone, without a word."""
    given = {"sfr_weight": 0.5, "sfr_warmup_steps": 2, "sfr_fresh_head": False}
    with pytest.raises(ValueError, match=r"sfr_weight, sfr_warmup_steps: no effect without SFR; .* sfr: false"):
        read_settings(write(tmp_path, **given))
    with pytest.raises(ValueError, match=r"sfr_preset, .*no effect without SFR"):
        read_settings(write(tmp_path, sfr_preset="reference"))
    assert read_settings(write(tmp_path, **given, sfr=True)).recipe["sfr"] is True
    saved = read_settings(write(tmp_path, **given, sfr=False)).recipe
    assert (saved["sfr"], saved["sfr_weight"]) == (False, 0.5)
    assert read_settings(write(tmp_path, **saved)).recipe == saved
    assert read_settings([*write(tmp_path, **given), "--sfr"]).recipe["sfr"] is True


def test_a_path_below_home_is_what_a_shell_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = read_settings(write(tmp_path, save="~/run", train_data_path=["0.5", "~/a", "0.5", "b~/c"])).recipe
    assert recipe["save"] == "/home/me/run"
    assert recipe["train_data_path"] == ["0.5", "/home/me/a", "0.5", "b~/c"]


def test_a_variable_of_the_environment_is_what_a_shell_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word, $SCRATCH/run would be a folder of this name in the current one."""
    monkeypatch.setenv("SCRATCH", "/scratch")
    recipe = read_settings(write(tmp_path, save="$SCRATCH/run", train_data_path=["${SCRATCH}/a", "b$SCRATCH"])).recipe
    assert recipe["save"] == "/scratch/run"
    assert recipe["train_data_path"] == ["/scratch/a", "b$SCRATCH"]
    with pytest.raises(ValueError, match=r"'\$SCRATCH/\$JOB': this variable"):
        read_settings(write(tmp_path, save="$SCRATCH/$JOB"))
    assert read_settings(write(tmp_path, save="~/a$SCRATCH")).recipe["save"].endswith("/a$SCRATCH")
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ValueError, match=r"recipe.yaml: '\$SCRATCH/run': this variable of the environment is not set"):
        read_settings(write(tmp_path, save="$SCRATCH/run"))


def test_flags_may_be_spelled_as_recipes_spell_them(tmp_path: Path) -> None:
    flags = ["--global_batch_size", "8", "--sfr_warmup=detached", "--override_opt_param_scheduler", "--sfr"]
    recipe = read_settings([*write(tmp_path), *flags]).recipe
    assert (recipe["global_batch_size"], recipe["sfr_warmup"]) == (8, "detached")
    assert recipe["override_opt_param_scheduler"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate", "1"], r"^unknown flag --learning-rate; did you mean --lr\?$"),
        (["--tp=2"], r"^unknown flag --tp; did you mean --tensor-model-parallel-size\?$"),
        (["--no_sfr"], r"^unknown flag --no-sfr: to turn sfr off, set `sfr: false` in a later recipe$"),
        (["--sfr", "true"], r"^'true' belongs to no flag: give options as --name value; a switch takes no value$"),
        (["--sfr=yes"], r"^argument --sfr: a switch takes no value, and this one has 'yes'$"),
        (["lr=1e-4"], r"^'lr' belongs to no flag: give options as --name value"),
    ],
)
def test_a_wrong_flag_is_answered_with_what_to_write_and_without_the_recipe(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 7\n")
    with pytest.raises(ValueError, match=message):
        check_recipes([tmp_path / "recipe.yaml"], flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1e-4}, "lr: below 0; give at least 0"),
        ({"clip_grad": -1.0}, "clip_grad: below 0"),
        ({"adam_beta2": 1.0}, "adam_beta2: give at least 0 and less than 1"),
        ({"min_lr": 0.01}, r"min_lr = 0\.01 is above lr = 0\.001: lower it"),
    ],
)
def test_numbers_that_an_optimizer_on_a_gpu_would_take_are_refused(
    tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(write(tmp_path, **changes))


def test_what_a_resumed_run_compares_is_among_the_options() -> None:
    assert vars(flag_parser().read([])).keys() >= {*SCHEDULE, *STATE, *DATA, *LAYOUT, *HALF}


def test_a_range_of_steps_is_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("profile_steps: 10:12\nseed: 7\nlr: 1.5\nsave: [-3, 0x10, 1_000]\n")
    expected = {"profile-steps": "10:12", "seed": 7, "lr": 1.5, "save": [-3, 16, 1000]}
    assert read_recipe(tmp_path / "recipe.yaml") == expected


def test_a_truth_value_is_not_taken_for_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("save: no\n")
    with pytest.raises(ValueError, match=r"save: False is not one value; .* in quotes where YAML takes it for true or"):
        check_recipes([tmp_path / "recipe.yaml"], [])
