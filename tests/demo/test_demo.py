"""The tiny demo from the command line: it writes every file, the model generates, and a rerun skips finished steps."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from megatron_sfr.cli import main
from megatron_sfr.demo.run import _write_recipes
from megatron_sfr.demo.scale import TINY
from tests import warm
from tests.hf.models import tiny_config


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks of its torchrun are forks; test_first_steps.py and `make test-recovery` start them as users do."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in warm.torchrun().items():
            patch.setenv(name, value)
        assert main(["demo", "--tiny", "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_leaves_models_and_a_comparison(output: Path) -> None:
    for name in ("base", "ce", "sfr"):
        network = AutoModelForCausalLM.from_pretrained(output / "models" / name)
        assert not any("flow_head" in parameter for parameter, _ in network.named_parameters())
    comparison = output / "comparison"
    assert (comparison / "comparison.png").read_bytes().startswith(b"\x89PNG")
    actual = json.loads((comparison / "evaluation.json").read_text())
    assert list(actual["scores"]) == ["CE", "CE+SFR"]
    assert {"precision", "fidelity", "coverage, seen", "coverage, near", "coverage, far"} <= actual["scores"][
        "CE"
    ].keys()
    assert actual["losses"]["CE"] != actual["losses"]["CE+SFR"]
    assert len(actual["verdicts"]) == 3
    metrics = [json.loads(line) for line in (output / "runs" / "sfr" / "metrics.jsonl").read_text().splitlines()]
    assert any("sfr loss" in record for record in metrics)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rerun_trains_nothing_and_prints_the_same(output: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()}
    assert main(["demo", "--tiny", "--output", str(output)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()}
    out = capsys.readouterr().out
    assert (output / "comparison" / "report.md").read_text() in out


@pytest.mark.slow
@pytest.mark.distributed
def test_the_model_generates(output: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["generate", "--model", str(output / "models" / "sfr"), "--prompt", "Why?", "--persona", "poet"]
    assert main([*command, "--samples", "2", "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_recipes_name_the_folder_whatever_it_is_called(tmp_path: Path) -> None:
    output, architecture = tmp_path / "STEPS: a, [b] #1 é\n", tmp_path / "model"
    config = tiny_config("Qwen3ForCausalLM")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(architecture)
    for name, path in _write_recipes(output, TINY, architecture).items():
        assert yaml.safe_load(path.read_text())["save"] == f"{output}/runs/{name}"


def test_a_folder_with_other_content_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    assert main(["demo", "--tiny", "--output", str(tmp_path)]) == 2
    assert "is not a demo folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "demo.json").write_text("{}")
    assert main(["demo", "--tiny", "--output", str(tmp_path / "other")]) == 2
    assert "other settings" in capsys.readouterr().err
