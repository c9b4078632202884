"""Diagnosis of models with data and a flow head, its page, and the command on a tiny model."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.transformer import TransformerConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sfr.cli import main
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import DEFAULT, TargetStore
from megatron_sfr.evaluation.lock_fork.examine import ExamineOptions, Head, examine
from megatron_sfr.evaluation.lock_fork.futures import FutureOptions, Scale
from megatron_sfr.evaluation.lock_fork.labels import LabelOptions
from megatron_sfr.evaluation.lock_fork.lock_fork_html import page, pieces
from megatron_sfr.evaluation.lock_fork.summary import Diagnosis, as_json, by_sample, shares, table
from megatron_sfr.evaluation.scores.bootstrap import estimate
from megatron_sfr.hf.head_files import DESCRIPTION, WEIGHTS
from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.option_names import to_arguments
from tests.evaluation.lock_fork.conftest import WIDTH
from tests.model.heads import randomized


@pytest.fixture(scope="module")
def store(data: PreparedData) -> TargetStore:
    return TargetStore.open(data.folder / DEFAULT, data)


@pytest.fixture(scope="module")
def diagnosis(tiny_model: Path, data: PreparedData, store: TargetStore) -> Diagnosis:
    """Two models; the base has a head with random weights."""
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, cuda_graph_modules=[])
    head = FlowHead(config, FlowHeadPlan(FlowHeadOptions(width=16), dim=store.dim)).eval()
    randomized(head)
    scale = Scale(torch.from_numpy(store.mean.copy()), torch.from_numpy(store.std.copy()), TargetOptions())
    options = ExamineOptions(LabelOptions(lock_top=0.2), FutureOptions(samples=6, steps=4, nodes=4), samples=3)

    def other() -> torch.nn.Module:
        network = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
        with torch.no_grad():
            network.lm_head.weight.mul_(2)  # lower entropy everywhere
        return network

    base = lambda: AutoModelForCausalLM.from_pretrained(tiny_model).eval()  # noqa: E731
    return examine({"base": base, "surer": other}, data, options, Head(head, scale))


def test_labels_come_from_the_base_and_apply_to_all_models(diagnosis: Diagnosis) -> None:
    label, base, surer = diagnosis.labelled.label, diagnosis.readings["base"], diagnosis.readings["surer"]
    assert {"lock", "neutral", "fork"} == set(label.tolist())
    assert base.entropy[label == "lock"].max() < base.entropy[label == "fork"].min()
    assert (surer.entropy < base.entropy).mean() > 0.9
    assert diagnosis.futures is not None
    assert diagnosis.futures.vectors.shape[:2] == (len(label), 6)
    rows = table(diagnosis, estimate)
    assert [row[:3] for row in rows if row[1] == "fork" and row[0] == "base"][-1] == ["base", "fork", "gain (nats)"]
    assert not any(row[0] == "surer" and row[2] == "dispersion" for row in rows)
    shown = next(row[3] for row in rows if row[:3] == ["base", "fork", "entropy"])
    assert shown.startswith(f"{base.entropy[label == 'fork'].mean():.3f} [")  # weighted by positions, not by samples


def test_means_by_sample() -> None:
    chosen, sample = np.array([True, True, False, True, False]), np.array([3, 3, 3, 8, 9])
    means, weights = by_sample(np.array([1.0, 3.0, 9.0, 5.0, 7.0]), chosen, sample)
    np.testing.assert_array_equal(means, [2, 5, np.nan])
    np.testing.assert_array_equal(weights, [2, 1, 0])


def test_shares_of_each_group_sum_to_1(diagnosis: Diagnosis) -> None:
    actual = shares(diagnosis, diagnosis.where.persona)
    np.testing.assert_allclose(np.sum(list(actual.values()), axis=0), 1)


def test_the_page_shows_the_whole_text_once_in_colours(
    diagnosis: Diagnosis, data: PreparedData, store: TargetStore, tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = page(diagnosis, table(diagnosis, estimate), ["A note."], tokenizer, data, store)
    shown = re.findall(r'<div class="text">(.*?)</div>', text, flags=re.DOTALL)
    assert len(shown) == 3
    for index, html in zip(dict.fromkeys(diagnosis.where.sample.tolist()), shown, strict=True):
        assert unescape(re.sub(r"<[^>]*>", "", html)) == tokenizer.decode(data[index].tokens.tolist())
    spans = re.findall(r'<span class="(lock|neutral|fork)"', text)
    assert sorted(spans) == sorted(diagnosis.labelled.label.tolist())
    assert "dispersion" in re.search(r'class="fork" title="(.*?)"', text, flags=re.DOTALL)[1]
    assert diagnosis.labelled.rule in unescape(text)
    segments = {store.prepared.texts[row] for row in range(len(store))}
    told = re.findall(r"<li>\d+: (.*?) \(-?\d\.\d\d\)</li>", text, flags=re.DOTALL)
    assert len(told) >= 3
    assert {unescape(segment) for segment in told} <= segments
    assert "http" not in text
    actual = json.loads(as_json(diagnosis, [["x"]]))
    assert actual["positions"]["label"] == diagnosis.labelled.label.tolist()


def test_pieces_of_a_text_are_the_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = tokenizer("Peace out, legend. Naïve — 你好!", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokens, tokenizer)) == tokenizer.decode(tokens)
    assert len(pieces(tokens, tokenizer)) == len(tokens)


def test_the_command_writes_page_and_numbers(
    tiny_model: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--data", str(data.folder), "--samples", "2", "--lock-top", "0.2", "--output", str(tmp_path)]
    assert main(["diagnose", "--model", f"a={tiny_model}", f"b={tiny_model}", *flags]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"lock_fork.html", "lock_fork.json"}
    actual = json.loads((tmp_path / "lock_fork.json").read_text())
    assert actual["base"] == "a"
    assert actual["models"]["a"] == actual["models"]["b"]
    assert "no flow head" in actual["rule"]
    assert "a: lock: entropy at most" in capsys.readouterr().out


def put_head(folder: Path, store: TargetStore, **said: object) -> FlowHead:
    """A head with random weights beside the model, as `convert export --keep-head` leaves it."""
    options, targets = FlowHeadOptions(width=16, layer=1), TargetOptions(scale="l2")
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, cuda_graph_modules=[])
    head = FlowHead(config, FlowHeadPlan(options, dim=store.dim))
    randomized(head.net)
    content = {"hidden_size": WIDTH, "dim": store.dim, "horizons": 1, "has_network": True, "gate_bins": 1}
    content |= {
        "head": to_arguments(options),
        "targets": to_arguments(targets),
        "loss": "flow",
        "encoder": None,
        **said,
    }
    (folder / DESCRIPTION).write_text(json.dumps(content))
    save_file(head.state_dict(), folder / WEIGHTS)
    return head.eval()


def test_the_command_draws_futures_from_the_head_beside_the_model(
    tiny_model: Path, data: PreparedData, store: TargetStore, tmp_path: Path
) -> None:
    """The result equals the library's with that head, its scale and its layer."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    head = put_head(model, store)
    flags = ["--data", str(data.folder), "--samples", "2", "--draws", "3", "--steps", "4", "--method", "euler"]
    assert main(["diagnose", "--model", f"a={model}", *flags, "--lock-top", "0.2", "--output", str(tmp_path)]) == 0
    actual = json.loads((tmp_path / "lock_fork.json").read_text())["positions"]
    scale = Scale(torch.from_numpy(store.mean.copy()), torch.from_numpy(store.std.copy()), TargetOptions(scale="l2"))
    options = ExamineOptions(LabelOptions(), FutureOptions(samples=3, steps=4, method="euler"), samples=2)
    network = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    expected = examine({"a": lambda: network}, data, options, Head(head, scale, layer=1)).futures
    assert expected is not None
    np.testing.assert_allclose(actual["dispersion"], expected.dispersion, atol=1e-5)
    np.testing.assert_allclose(actual["gain"], expected.gain, rtol=1e-4)
    assert "by euler in 4 steps" in (tmp_path / "lock_fork.html").read_text()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"loss": "mse"}, "sfr_loss = mse"),
        ({"encoder": {"encoder_sha256": "other"}}, "another encoder"),
        ({"hidden_size": 7}, "do not belong together"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tiny_model: Path,
    data: PreparedData,
    store: TargetStore,
    said: dict,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    put_head(tmp_path, store, **said)
    flags = ["--data", str(data.folder), "--head", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["diagnose", "--model", str(tiny_model), *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--samples", "0"], "samples is 0"),
        (["--lock-entropy", "0.9"], "lower lock_entropy"),
        (["--draws", "4"], "--draws goes with a flow head, which .* does not have: leave it out"),
        (["--model", "{model}/nowhere"], "not a Hugging Face model"),
        (["--data", "{model}/nowhere"], "does not exist"),
    ],
)
def test_the_command_reports_wrong_input(
    tiny_model: Path, data: PreparedData, flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fixed = ["--model", f"a={tiny_model}", "--data", str(data.folder), "--output", str(tmp_path / "out")]
    assert main(["diagnose", *fixed, *(flag.format(model=tiny_model) for flag in flags)]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
