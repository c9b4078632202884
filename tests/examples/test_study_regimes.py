"""The study's regimes: their recipes, folders and fixed settings; replies that are sampled apart from their scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.dictionary_styles.study import controls
from examples.dictionary_styles.study.plan import REGIMES, WIDE, Plan, Regime, candidates, choose_arms, fixed, judged
from examples.dictionary_styles.study.work import JUDGING, Place, Task, losses_file, read_answers
from megatron_sfr.config.settings import flag_parser, read_settings, to_flags
from megatron_sfr.config.validation import contradiction

FIXED = [regime for regime in REGIMES if regime.settings is not None]


def plan_of(regime: Regime) -> Plan:
    return Plan(seeds=(1, 2), steps=regime.steps, arms=choose_arms(["CE", "SFR", "GEM+SFR", "GEM"]), regime=regime)


@pytest.mark.parametrize("regime", FIXED, ids=lambda regime: regime.name)
def test_a_regime_fixes_settings_text_and_what_is_trained(regime: Regime, tmp_path: Path) -> None:
    plan, place = plan_of(regime), Place(tmp_path, start=tmp_path / "start", regime=regime)
    settings = fixed(plan)
    assert settings is not None
    assert candidates(plan) == []
    recipes, shape = {}, Place(tmp_path).shape
    for run in judged(plan, settings)[: len(plan.arms)]:
        words = [str(word) for word in place.training(run, tmp_path / run.name)]
        recipes[run.arm.name] = read_settings(["--recipe", str(shape), *words[1:]]).recipe
    for recipe in recipes.values():
        assert recipe["train_data_path"] == [str(tmp_path / f"study-start-{regime.name}" / "text" / "train")]
        assert recipe["train_iters"] == 60
        assert recipe["seq_length"] * recipe["global_batch_size"] == 2048
        assert ("lora_rank" in recipe) == regime.lora
    assert "sfr" not in recipes["CE"]
    assert recipes["SFR"]["sfr_warmup_steps"] + recipes["SFR"]["sfr_ramp_steps"] < regime.least
    runs = {run.arm.name: dict(run.settings) for run in judged(plan, settings)}
    assert runs["SFR"]["sfr_grad_ratio"] == 0.3
    assert runs["GEM+SFR"] == runs["SFR"] | {"gem_beta": 0.7, "gem_h": "linear"}
    assert place.text("train") == tmp_path / "text-50" / "train.jsonl"
    assert place.text("validation") == Place(tmp_path).text("validation") == tmp_path / "text" / "validation.jsonl"


@pytest.mark.parametrize("regime", FIXED, ids=lambda regime: regime.name)
def test_transformer_engine_takes_the_packed_sequences_of_a_regime(regime: Regime, tmp_path: Path) -> None:
    gpu = Path(controls.__file__).with_name("gpu_packed.yaml")
    place = Place(tmp_path, start=tmp_path / "start", recipe=gpu, regime=regime)
    run = judged(plan_of(regime), {"SFR": {}})[1]
    shape, *words = ["--recipe", str(Place(tmp_path).shape)], *map(str, place.training(run, tmp_path / "run")[1:])
    recipe = read_settings([*shape, *words]).recipe | {"sfr_backend": "cuda", "transformer_impl": "transformer_engine"}
    args = flag_parser().read(to_flags(recipe, flag_parser()))
    assert (args.sfr_packing, args.global_batch_size) == ("first_fit_decreasing", 16)
    assert contradiction(args) is None
    args.micro_batch_size = 8
    assert "takes one sequence at a time" in str(contradiction(args))


def test_regimes_do_not_share_a_folder(tmp_path: Path) -> None:
    places = [Place(tmp_path, start, regime=regime) for regime in REGIMES for start in (None, tmp_path / "start")]
    assert len({place.study for place in places}) == len(places)
    assert {place.base for place in places if place.start is None} == {tmp_path / "study" / "base-hf"}
    with pytest.raises(ValueError, match="give at least 40"):
        Plan(steps=39, regime=FIXED[0])
    assert WIDE.settings is None


def test_replies_are_scored_as_they_were_sampled(tmp_path: Path) -> None:
    """`--stages sample` writes what `--stages score` reads, and a file that is not complete is refused."""
    plan, place = replace(plan_of(FIXED[0]), samples=2), Place(tmp_path, regime=FIXED[0])
    task = Task(judged(plan, fixed(plan) or {})[1], JUDGING, plan, place)
    texts = [f"reply {i}" for i in range(len(task.sweep) * 3 * 2)]
    task.samples.parent.mkdir(parents=True)
    task.samples.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(losses_file(task), np.array([[1.0, 2.0], [3.0, 4.0]]))
    read = read_answers(task, prompts=3)
    assert [text for at in read.replies for row in at for text in row] == texts
    assert read.temperatures == task.sweep == plan.temperatures
    assert np.array_equal(read.losses["held-out replies"][1], [3.0, 4.0])
    assert replace(task, stages=("sample",)).is_done
    assert not task.is_done
    with pytest.raises(ValueError, match="does not have all replies"):
        read_answers(task, prompts=4)


def test_the_baseline_is_stopped_where_its_training_loss_is_the_arms() -> None:
    baseline = [4.0 - 0.05 * step for step in range(1, 61)]
    arm = [max(loss, 2.2) for loss in baseline]  # the last ten steps' mean is 2.2, the baseline's around step 40
    step, (target, reached) = controls.training_stop(arm, baseline)
    assert (step, target, reached) == (40, pytest.approx(2.2), pytest.approx(4.0 - 0.05 * 35.5))
    assert controls.training_stop(baseline, baseline)[0] == 60


def test_the_baseline_is_stopped_at_the_last_step_with_the_arms_held_out_loss() -> None:
    """The loss falls, then rises: the later of two equal ones is meant. Below every step's loss: the best."""
    curve = {60: 4.2, 55: 4.1, 50: 3.9, 45: 3.7, 40: 3.5, 35: 3.6, 30: 3.9}
    asked: list[int] = []

    def loss_at(step: int) -> float:
        asked.append(step)
        return curve[step]

    assert controls.held_out_stop(3.95, loss_at, curve) == (50, (3.95, 3.9))
    assert asked == [60, 55, 50]
    assert controls.held_out_stop(3.0, loss_at, curve) == (40, (3.0, 3.5))


def test_a_stopped_baseline_is_sampled_as_the_baseline_is(tmp_path: Path) -> None:
    """Its weights come from a run that differs from the baseline's only in what it saves."""
    plan, place = plan_of(FIXED[0]), Place(tmp_path, start=tmp_path / "start", regime=FIXED[0])
    baseline, arm = judged(plan, fixed(plan) or {})[:2]
    recipes = []
    for run in (baseline, controls.kept(plan, baseline.seed)):
        words = [str(word) for word in place.training(run, tmp_path / "run")]
        recipes.append(read_settings(["--recipe", str(Place(tmp_path).shape), *words[1:]]).recipe)
    changed = {key for key in recipes[0].keys() | recipes[1].keys() if recipes[0].get(key) != recipes[1].get(key)}
    assert changed == {"save_interval", "no_save_optim"}
    stops = [controls.Stop(arm, kind, 40, (1.0, 1.1)) for kind in controls.KINDS]
    folders = {place.folder(stop.control) for stop in stops}
    assert len(folders | {place.folder(baseline), place.folder(arm)}) == 4
    assert {plan.sweep(stop.control.arm, judging=True) for stop in stops} == {plan.sweep(baseline.arm, judging=True)}
