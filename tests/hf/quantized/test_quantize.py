"""`convert quantize`: folders for engines hold the calibrated numbers, simulated ones restore to the same logits.

The tests that quantize run where nvidia-modelopt is installed (the extra `quant`); the refusals run without it.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sfr.cli import main
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.hf.quantized.number_formats import E4M3, nvfp4_values
from tests.distributed.tiny import write_corpus
from tests.hf.models import save_model

HAS_OPTIMIZER = importlib.util.find_spec("modelopt") is not None
with_optimizer = pytest.mark.skipif(not HAS_OPTIMIZER, reason="needs nvidia-modelopt: the extra quant")
theirs = pytest.mark.filterwarnings(
    "default"
)  # Model Optimizer's warnings, of layers that its configurations leave out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 model with a tokenizer, and conversations beside it."""
    folder = tmp_path_factory.mktemp("quantize")
    text = write_corpus(folder).read_text(encoding="utf-8")
    save_model(folder / "hf", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, head_dim=16)
    train_tokenizer([text], 500).save_pretrained(folder / "hf")
    return folder / "hf"


def arguments(model: Path, output: Path, kind: str, *flags: str) -> list[str]:
    corpus = model.parent / "corpus.jsonl"
    words = ["convert", "quantize", model, "--format", kind, "--calibration", corpus, "--output", output, *flags]
    return [*map(str, words)]


def quantize(model: Path, output: Path, kind: str, *flags: str) -> int:
    return main(arguments(model, output, kind, *flags))


@pytest.mark.skipif(HAS_OPTIMIZER, reason="nvidia-modelopt is installed")
def test_what_is_missing_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("fp8", "nvfp4"):
        assert quantize(model, tmp_path / "out", kind) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert 'pip install "megatron-sfr[quant]"' in line
    assert list(tmp_path.iterdir()) == []


def quantized_copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_other_inputs_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "experts", "Qwen3MoeForCausalLM")
    capsys.readouterr()

    def refused(folder: Path, kind: str, *flags: str, output: Path = tmp_path / "out") -> str:
        assert quantize(folder, output, kind, *flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "add --simulated to evaluate the format" in refused(model, "int8")
    assert "leave --simulated out, or choose fp8 or int8" in refused(model, "nvfp4", "--simulated")
    assert "is quantized already (NVFP4): start from" in refused(quantized_copy(model, tmp_path / "again"), "fp8")
    simulated = shutil.copytree(model, tmp_path / "simulated")
    (simulated / "modelopt_state.pth").write_bytes(b"")
    assert "is quantized already (it has modelopt_state.pth)" in refused(simulated, "fp8", "--simulated")
    assert "is the model to quantize: choose another" in refused(model, "fp8", "--force", output=model)
    assert "experts are not quantized here" in refused(tmp_path / "experts", "fp8")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exit:
        quantize(model, tmp_path / "out", "fp6")
    assert exit.value.code == 2


@with_optimizer
@theirs
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_stored_numbers_are_within_a_step(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / kind, kind) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 4
    assert "28 weights in " + kind in said
    before, after = map(
        float, re.search(r"loss on 5 other conversations: ([\d.]+) in bf16, ([\d.]+) in", said).groups()
    )
    assert 0 < abs(after - before) < 0.2 * before
    original, stored = load_file(model / "model.safetensors"), load_file(tmp_path / kind / "model.safetensors")
    for name, weight in original.items():
        if f"{name}_scale" not in stored:
            assert torch.equal(stored[name], weight), name
            continue
        w, scale = weight.float(), stored[f"{name}_scale"]
        slack = w.abs() * 2**-8  # Model Optimizer divides in bf16
        if kind == "fp8":
            assert (stored[name].dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, ())
            error = (stored[name].float() * scale - w).abs()
            assert (error <= w.abs() / 16 + scale * 2**-10 + slack).all(), name
            continue
        second = stored[f"{name}_scale_2"]
        step = (scale.float() * second).repeat_interleave(16, dim=1)
        error = (nvfp4_values(stored[name], scale, second) - w).abs()
        assert (error <= step + slack).all(), name
        small = w.abs() <= 2 * step
        assert (error[small] <= 0.25 * step[small] + slack[small]).all(), name
    config = json.loads((tmp_path / kind / "config.json").read_text())
    assert config.pop("quantization_config")["quant_algo"] == kind.upper()
    assert config == json.loads((model / "config.json").read_text())
    assert (tmp_path / kind / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@with_optimizer
@theirs
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_simulated_ones_restore_and_are_near_the_original(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / kind, kind, "--simulated") == 0
    said = capsys.readouterr().out
    assert 0 < float(re.search(r"rms of the difference ([\d.e-]+) of theirs", said)[1]) < 0.5
    assert "calibrated on 35 conversations" in said
    assert "restored bit for bit" in said
    assert (tmp_path / kind / "modelopt_state.pth").is_file()
    assert (tmp_path / kind / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / kind / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@with_optimizer
def test_widths_that_the_format_cannot_hold_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "hf")
    save_model(tmp_path / "hf", dtype=torch.bfloat16, hidden_size=64, intermediate_size=120, head_dim=16)
    shutil.copy(model.parent / "corpus.jsonl", tmp_path)
    assert quantize(tmp_path / "hf", tmp_path / "out", "nvfp4") == 2
    assert "down_proj has 120 inputs, and NVFP4 needs a multiple of 16: choose fp8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@with_optimizer
def test_a_killed_command_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_sfr.cli", *arguments(model, tmp_path / "out", "fp8")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".out.partial" / "model.safetensors").exists():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before its first file of weights"
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
