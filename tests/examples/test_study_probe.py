"""The study's probes: measures against closed forms on states made up to have them, and h against transformers'."""

from math import erf, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.dictionary_styles.study.plan import REGIMES, Plan, choose_arms
from examples.dictionary_styles.study.probe import __main__ as command
from examples.dictionary_styles.study.probe.measures import (
    between_personas,
    difference,
    measures,
    one_hot,
    participation_ratio,
    r_squared,
    relations,
)
from examples.dictionary_styles.study.probe.positions import Positions, weights
from examples.dictionary_styles.study.probe.states import hidden_states, supervised
from examples.dictionary_styles.study.work import Place
from megatron_sfr.data.prepared.conversations import Anchors, Sample
from megatron_sfr.evaluation.scores.bootstrap import resamples

HEADWORDS, EACH = 40, 100
N = HEADWORDS * EACH


def positions(personas: int = 2) -> Positions:
    generator = np.random.default_rng(0)
    headword = np.arange(N) // EACH
    quarter = generator.permutation(HEADWORDS) % 4
    return Positions(headword, generator.integers(personas, size=N), np.arange(N) % EACH, quarter)


def noise(width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, width))


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_a_persona_is_read_as_often_as_its_signal_allows(distance: float) -> None:
    """Two personas at +-distance in one of eight directions of unit noise: the best is right in Phi(distance)."""
    at, h = positions(), noise(8)
    h[:, 2] += distance * (2 * at.persona - 1)
    found = measures(h, at, {})
    assert found["persona read after 16 or more"][0] == pytest.approx((1 + erf(distance / sqrt(2))) / 2, abs=0.02)
    assert found["norm"][0] == pytest.approx(np.linalg.norm(h, axis=1).mean())


def test_r_squared_of_a_known_linear_model_leaves_out_persona_and_distance() -> None:
    at, h = positions(), noise(8)
    matrix = np.random.default_rng(2).normal(size=(8, 3))
    known = 5.0 * noise(3, seed=3)[at.persona] + 3.0 * (at.distance < 8)[:, None]
    target = h @ matrix + 2.0 * noise(3, seed=4) + known
    explained = np.square(matrix).sum() / (np.square(matrix).sum() + 3 * 2.0**2)
    assert r_squared(h, target, at)[0] == pytest.approx(explained, abs=0.02)
    assert r_squared(one_hot(at.persona), target, at)[0] == pytest.approx(0, abs=0.01)
    assert r_squared(noise(8, seed=5), target, at)[0] == pytest.approx(0, abs=0.01)


def test_variance_between_personas_by_its_definition() -> None:
    """Two equal personas at +-3, each with values at +-4 around its mean: 9 of 25."""
    at = Positions(np.arange(8) // 2, np.arange(8) % 2, np.zeros(8, int), np.arange(4))
    h = np.stack([3.0 * (2 * at.persona - 1), 4.0 * (2 * (np.arange(8) // 4) - 1)], axis=1) + 7
    assert between_personas(h, at)[0] == pytest.approx(9 / 25)


def test_participation_ratio_is_the_number_of_equal_directions() -> None:
    rows = np.concatenate([np.eye(6)[:4], -np.eye(6)[:4]])
    at = Positions(np.arange(8), np.zeros(8, int), np.zeros(8, int), np.arange(8) % 4)
    assert participation_ratio(rows, at)[0] == pytest.approx(4, rel=1e-5)


def test_resampled_headwords_give_what_their_repeated_positions_give() -> None:
    at, h = positions(), noise(5) * np.arange(1, 6) + 2
    h[:, 0] += at.persona
    assert (weights(HEADWORDS)[0] == 1).all()
    drawn = np.concatenate([np.flatnonzero(at.headword == p) for p in resamples(HEADWORDS)[6]])
    repeated = at.at(drawn)
    for measure in (between_personas, participation_ratio):
        assert measure(h, at)[7] == pytest.approx(measure(h[drawn], repeated)[0], rel=1e-4)
    assert at.mean(h[:, 1])[7] == pytest.approx(h[drawn, 1].mean())


def test_arms_differ_beyond_noise_by_the_rule_of_the_verdicts() -> None:
    baseline = np.array([[1.0], [1.1], [1.2]]) + 0.01 * np.random.default_rng(0).normal(size=(3, 501))
    found = difference(baseline + 0.3, baseline, HEADWORDS)
    assert found.moved
    assert found.estimate.mean == pytest.approx(0.3)
    assert found.noise == pytest.approx(0.2, abs=0.05)
    assert not difference(baseline + 0.1, baseline, HEADWORDS).moved  # less than two seeds of the baseline differ by
    assert not difference(baseline + np.array([[0.9], [0.9], [-0.1]]), baseline, HEADWORDS).moved


def test_distances_and_changes_between_models() -> None:
    at, start, step = positions(), noise(4), 0.5 * noise(4, seed=2)
    models = {"start": [start], "CE": [start + step, start + 2 * step], "SFR": [start - step, start - step]}
    head, *body = relations(models, at, "SFR")
    table = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    unit = np.sqrt(np.square(step).sum() / np.square(start - start.mean(axis=0)).sum())
    assert float(table["SFR and the start"]["distance"].split()[0]) == pytest.approx(unit, abs=1e-3)
    assert float(table["SFR and CE, same seed"]["distance"].split()[0]) == pytest.approx(2.5 * unit, abs=1e-3)
    assert table["SFR and CE, same seed"][head[-1]].startswith("-1.000")
    assert table["CE and CE, other seed"][head[-1]].startswith("1.000")


def test_hidden_states_of_a_padded_batch_are_those_of_each_reply() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval().base_model
    nothing, generator, samples = np.zeros(0, np.int32), np.random.default_rng(0), []
    for length in (9, 5, 12):
        tokens = generator.integers(50, size=length).astype(np.int32)
        samples.append(Sample(tokens, (np.arange(length) > 3).astype(np.uint8), Anchors(*[nothing] * 6), "bierce"))
    found = hidden_states(backbone, samples)
    with torch.inference_mode():
        each = [backbone(torch.from_numpy(s.tokens[:-1]).long()[None]).last_hidden_state[0] for s in samples]
    expected = np.concatenate([h[supervised(s)].numpy() for h, s in zip(each, samples, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(found) == 5 + 1 + 8


def test_a_study_that_has_not_run_is_refused(tmp_path: Path) -> None:
    regime = next(regime for regime in REGIMES if regime.settings is not None)
    plan = Plan(steps=regime.steps, arms=choose_arms(["SFR"]), regime=regime)
    (tmp_path / "start").mkdir()
    with pytest.raises(ValueError, match="ce-60-s1/hf is missing: run the study first"):
        command.model_folders(plan, Place(tmp_path, start=tmp_path / "start", regime=regime), "SFR")
