"""The study of examples/dictionary_styles: its recipes, its verdicts on curves made up to have one, its files."""

import ctypes
import json
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from examples.dictionary_styles.study import choice, controls, cost, materials, page, stages
from examples.dictionary_styles.study.plan import (
    ARMS,
    AXES,
    BASELINE,
    CHOOSING_SEED,
    Arm,
    Plan,
    Run,
    candidates,
    choose_arms,
    judged,
)
from examples.dictionary_styles.study.verdicts import Verdict, compare
from examples.dictionary_styles.study.work import CHOOSING, STAGES, Place, read_curve, save
from megatron_sfr.config.settings import read_settings
from megatron_sfr.evaluation.compare.curves import Curve, Loss
from tests.house.test_cluster_recipes import QWEN3_CONFIG, validate

PROMPTS = 60
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)


def curve(seed: int, lift: float = 0.0, noise: float = 0.02) -> Curve:
    """Quality falls and diversity rises with the temperature; lift: diversity added at every quality."""
    generator = np.random.default_rng(seed)
    t = np.array(TEMPERATURES)[:, None]
    quality = 0.9 - 0.3 * t + generator.normal(0, noise, (len(t), PROMPTS))
    similarity = 0.5 - 0.3 * t - lift + generator.normal(0, noise, (len(t), PROMPTS))
    scores = {"style fidelity": quality, "relevance": quality, "CS-SB-1": similarity, "self-BLEU-4": similarity}
    loss = Loss(np.full(PROMPTS, 12.0), np.full(PROMPTS, 4.0))
    return Curve(f"run {seed}", TEMPERATURES, scores, {"held-out replies": loss}, {"bierce": loss})


def verdict(lifts: tuple[float, ...], baseline: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Verdict:
    arm = [curve(10 + i, lift) for i, lift in enumerate(lifts)]
    return compare("SFR", arm, [curve(i, lift) for i, lift in enumerate(baseline)], AXES[0])


def test_a_higher_frontier_is_called_so_by_how_much_it_is_higher() -> None:
    found = verdict((0.05, 0.05, 0.05))
    assert found.moved
    assert found.estimate.mean == pytest.approx(0.05, abs=0.01)
    assert "more diverse at equal quality" in found.sentence


def test_a_lower_frontier_is_called_so() -> None:
    assert "less diverse at equal quality" in verdict((-0.05, -0.05, -0.05)).sentence


def test_equal_arms_do_not_differ() -> None:
    found = verdict((0.0, 0.0, 0.0))
    assert not found.moved
    assert "no difference beyond noise" in found.sentence


def test_an_effect_needs_the_same_sign_in_every_seed() -> None:
    assert not verdict((0.2, 0.2, -0.02)).moved


def test_an_effect_within_the_spread_of_the_baselines_seeds_does_not_count() -> None:
    found = verdict((0.09, 0.05, 0.13), baseline=(0.0, 0.04, 0.12))
    assert found.noise == pytest.approx(0.12, abs=0.02)
    assert found.estimate.low < found.estimate.mean < found.noise
    assert not found.moved


def test_headwords_without_a_value_are_left_out_for_every_run() -> None:
    arm, baseline = curve(1), curve(2)
    arm.scores["CS-SB-1"][2, 7] = np.nan
    assert compare("SFR", [arm, arm], [baseline, baseline], AXES[0]).estimate.n == PROMPTS - 1


def test_on_one_bent_frontier_few_temperatures_lie_below_many() -> None:
    def bent(seed: int, temperatures: tuple[float, ...], warmth: float) -> Curve:
        """On one frontier, which bends outwards: diversity rises early, quality falls late."""
        generator = np.random.default_rng(seed)
        t = warmth * np.array(temperatures)[:, None]
        quality = 0.9 - 0.3 * t**2 + generator.normal(0, 0.002, (len(t), PROMPTS))
        similarity = 0.5 * np.exp(-4 * t) + generator.normal(0, 0.002, (len(t), PROMPTS))
        return replace(curve(seed), temperatures=temperatures, scores={"relevance": quality, "self-BLEU-4": similarity})

    plan = Plan()
    same = [bent(10 + i, plan.temperatures, 1.0) for i in range(3)]
    few, many = (
        compare("GEM", same, [bent(i, temperatures, 1.0) for i in range(3)], AXES[1])
        for temperatures in (plan.temperatures, plan.sweep(plan.find(BASELINE), judging=True))
    )
    assert abs(few.estimate.mean) < 2e-4
    assert -5e-3 < many.estimate.mean < -1e-3


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.slug)
def test_every_arm_starts_from_the_same_model_and_differs_in_its_objective(arm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    chosen = {other.name: dict(other.tried[-1]) for other in ARMS} | {"SED": {"sed_threshold": 0.6}}
    runs = [run for run in judged(Plan(), chosen) if run.seed == 1]
    place = Place(tmp_path)
    flags = {run.arm.name: list(map(str, place.training(run, tmp_path / run.name))) for run in runs}
    base, ours = (read_settings(["--recipe", *flags[name]]).recipe for name in (BASELINE, arm.name))
    differing = {key for key in {*base, *ours} if base.get(key) != ours.get(key)}
    places = {"save", "load", "tensorboard_dir"}
    assert {key for key in differing - places if not key.startswith(("sfr", "gem", "sed", "mtp", "objective"))} == set()
    assert ours["sfr_hf_load"] == str(tmp_path / "study" / "base-hf")
    assert "pretrained_checkpoint" not in ours


@pytest.mark.parametrize("arm", ["SFR", "MTP"])
def test_upstream_takes_an_arm_from_a_pretrained_model_on_a_gpu(arm: str, tmp_path: Path) -> None:
    """Parsed and checked as on one GPU; no GPU has run it."""
    start, gpu = tmp_path / "Qwen3-0.6B", Path(materials.__file__).with_name("gpu.yaml")
    start.mkdir()
    small = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    (start / "config.json").write_text(json.dumps(QWEN3_CONFIG | small | {"tie_word_embeddings": True}))
    place = Place(tmp_path / "root", start, gpu, "cuda")
    materials.describe(place)()
    (run,) = (run for run in judged(Plan(), {}) if (run.arm.name, run.seed) == (arm, 1))
    shape, *words = map(str, place.training(run, tmp_path / "run"))
    recipes = [shape, *(words[i + 1] for i in range(len(words)) if words[i] == "--recipe")]
    flags = words[2 * len(recipes) - 2 :]
    merged = {key: value for path in recipes for key, value in yaml.safe_load(Path(path).read_text()).items()}
    (tmp_path / "merged.yaml").write_text(yaml.safe_dump(merged))
    done = validate(1, str(tmp_path / "merged.yaml"), *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["layers"] == [28]
    assert (merged["vocab_size"], merged["lr"], merged["untie_embeddings_and_output_weights"]) == (151936, 2e-5, False)
    assert f"--train-data-path {place.study}/text/train" in " ".join(flags)


def test_a_study_is_made_from_one_thing(tmp_path: Path) -> None:
    materials.claim(Place(tmp_path), STAGES)
    materials.claim(Place(tmp_path), STAGES)
    (tmp_path / "more.yaml").write_text("lr: 1.0e-4")
    with pytest.raises(ValueError, match="study was begun with another recipe: move that folder"):
        materials.claim(Place(tmp_path, recipe=tmp_path / "more.yaml"), STAGES)
    materials.claim(Place(tmp_path, start=tmp_path / "other", recipe=tmp_path / "more.yaml"), STAGES)


def test_a_study_may_be_carried_to_a_gpu_and_back(tmp_path: Path) -> None:
    """Its folder is copied; the start lies elsewhere there, and only training and sampling have a recipe."""
    starts = [tmp_path / where / "SmolLM2" for where in ("here", "there", "other")]
    for start in starts:
        start.mkdir(parents=True)
        (start / "model.safetensors").write_text(start.parent.name[-3:])
    (starts[1] / "model.safetensors").write_bytes((starts[0] / "model.safetensors").read_bytes())
    (tmp_path / "gpu.yaml").write_text("lr: 1.0e-4")
    here, there, other = (Place(tmp_path, start=start) for start in starts)
    gpu = replace(there, recipe=tmp_path / "gpu.yaml", device="cuda")
    materials.claim(here, ("materials",))
    materials.claim(gpu, ("train", "sample"))
    materials.claim(here, ("score",))
    with pytest.raises(ValueError, match="begun with another recipe and device"):
        materials.claim(there, ("sample",))
    with pytest.raises(ValueError, match="begun with another model"):
        materials.claim(other, ("score",))


def test_stages_name_a_file_that_was_not_carried(tmp_path: Path) -> None:
    place = Place(tmp_path, start=tmp_path / "start")
    carried = [place.text("train"), tmp_path / "wide-text" / "prompts.jsonl", place.shape]
    carried += [place.data(side) / "targets" / "statistics.bin" for side in ("train", "validation")]
    for path in carried:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    materials.check(place, ("train", "sample"))
    place.shape.unlink()
    materials.check(place, ("sample",))
    with pytest.raises(ValueError, match=r"model\.yaml is missing: make it by --stages materials, or copy it"):
        materials.check(place, ("train", "sample"))


def test_incomplete_targets_are_resumed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.data("train") / "targets").mkdir(parents=True)
    signs = {name: sign.exists() for name, sign, _ in materials.tokens(place)}
    assert signs["targets of text/train"] is False
    (place.data("train") / "targets" / "statistics.bin").touch()
    signs = {name: sign.exists() for name, sign, _ in materials.tokens(place)}
    assert signs["targets of text/train"] is True


def test_an_ablation_takes_over_what_was_chosen_for_its_model() -> None:
    chosen = {"CE": {}, "SFR": {"sfr_grad_ratio": 0.3}, "GEM": {"gem_beta": 0.85}, "GEM+SFR": {"gem_h": "linear"}}
    runs = {run.arm.name: dict(run.settings) for run in judged(Plan(seeds=(1, 2)), chosen)}
    assert runs["SFR-mse"] == {"sfr_grad_ratio": 0.3}
    assert runs["GEM+SFR"] == {"sfr_grad_ratio": 0.3, "gem_beta": 0.85, "gem_h": "linear"}


def test_settings_are_chosen_by_other_runs_than_are_judged() -> None:
    plan = Plan()
    chosen = {arm.name: arm.tried[0] for arm in ARMS}
    assert not {run.name for run in candidates(plan)} & {run.name for run in judged(plan, chosen)}
    with pytest.raises(ValueError, match="judge other ones"):
        Plan(seeds=(CHOOSING_SEED, 1))
    with pytest.raises(ValueError, match="two or more"):
        Plan(seeds=(1,))


def test_the_highest_frontier_is_chosen(tmp_path: Path) -> None:
    plan, place = Plan(), Place(tmp_path)
    for i, run in enumerate(candidates(plan)):
        best = {"sfr_grad_ratio": 0.3, "gem_beta": 0.7}.items() & dict(run.settings).items()
        path = place.curve(run, CHOOSING, plan)
        path.parent.mkdir(parents=True)
        save(curve(i, 0.1 if best else 0.0), path)
    chosen, tried = choice.choose(plan, place, sed_threshold=0.5)
    assert chosen["SFR"] == {"sfr_grad_ratio": 0.3}
    assert chosen["GEM"] == {"gem_beta": 0.7}
    assert chosen["SED"] == {"sed_threshold": 0.5}
    assert [row["chosen"] for row in tried["SFR"]] == [False, True, False]


def test_a_curve_is_read_as_it_was_saved(tmp_path: Path) -> None:
    made = curve(3)
    save(made, tmp_path / "c.npz")
    read = read_curve(tmp_path / "c.npz", made.model, TEMPERATURES)
    assert all(np.array_equal(read.scores[name], values) for name, values in made.scores.items())
    assert np.array_equal(read.losses["held-out replies"].nll, made.losses["held-out replies"].nll)
    (tmp_path / "c.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match="remove it and run again"):
        read_curve(tmp_path / "c.npz", "x", TEMPERATURES)


def test_another_way_to_ask_is_another_file() -> None:
    run, plan = judged(Plan(), {arm.name: {} for arm in ARMS})[0], Plan()
    asked = [plan, replace(plan, samples=8), replace(plan, sampling_seed=1), replace(plan, temperatures=(0.5, 1.0))]
    assert len({Place().curve(run, CHOOSING, each) for each in asked}) == len(asked)


def test_a_win_that_is_not_repeated_is_listed_under_no_effect() -> None:
    won, lost = verdict((0.05, 0.05, 0.05)), verdict((0.0, 0.0, 0.0))
    curves = {BASELINE: [curve(1)], "SFR": [curve(2)]}
    found = page.Found(Plan(), {}, {}, curves, [won], [lost], {})
    assert page.said(found, moved=True) == []
    assert page.said(found, moved=False)[0].endswith("Not so in a second sampling.")
    repeated = f"{lost.gap}; {lost.seeds}; {lost.noise:.3f}"
    assert page.comparisons(found)[1][-2:] == [repeated, "no difference beyond noise"]
    assert replace(found, repeated=[verdict((-0.05, -0.05, -0.05))]).moved == []
    twice = replace(found, repeated=[won])
    assert twice.moved == [won]
    assert page.comparisons(twice)[1][-1] == "more diverse at equal quality, beyond noise"


def test_the_page_names_the_steps_that_the_baseline_was_stopped_at() -> None:
    arm = Arm("SFR")
    stops = [controls.Stop(Run(arm, (), seed, 60), "held-out", 35 + seed, (3.9, 3.8)) for seed in (1, 2, 3)]
    compared = controls.Controlled(verdict((0.05, 0.05, 0.05)), stops)
    found = page.Found(Plan(), {}, {}, {}, [], [], {}, [compared])
    (line,) = page.controlled(found)[1:]
    assert line[:2] == ["SFR", "held-out"]
    assert line[-2:] == [
        "36 (3.900, 3.800), 37 (3.900, 3.800), 38 (3.900, 3.800)",
        "more diverse at equal quality, beyond noise",
    ]
    assert page.controlled(replace(found, controls=[])) == []


def test_costs_are_medians_beside_the_baselines() -> None:
    lines = cost.table({"CE": [1.0, 1.0, 4.0], "SFR": [1.2, 1.3, 1.2]})
    assert lines[2][0] == "SFR"
    assert lines[2][3] == "1.200"


def test_wrong_calls_end_with_2_and_one_line(capsys: pytest.CaptureFixture) -> None:
    assert stages.main(["--seeds", "1"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "study: error: seeds (1,): two or more different ones, or nothing tells noise from an effect"
    ]
    assert stages.main(["--controls", "--stages", "train", "sample"]) == 2
    assert "study: error: --controls needs all stages: leave --stages out" in capsys.readouterr().err
    assert stages.main(["--arms", "SFR", "KTO"]) == 2
    assert "study: error: KTO is not an arm: choose from CE, SFR, " in capsys.readouterr().err


def test_a_worker_ends_with_the_study() -> None:
    with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        asked = ctypes.c_int()
        stages._begin()
        ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
        os._exit(asked.value)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_chosen_arms_include_the_baseline() -> None:
    assert [arm.name for arm in choose_arms(["SFR-mse", "SFR"])] == ["CE", "SFR", "SFR-mse"]
