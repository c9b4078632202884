"""Quantised models restore to the same logits, near the original's. Without Model Optimizer the error is one line.

The tests that quantise run where nvidia-modelopt is installed (the extra `quant`); on CPU its formats are simulated.
"""

import importlib.util
import json
import re

import pytest
import torch

from megatron_sfr.cli import main
from megatron_sfr.demo.train_tokenizer import save_tokenizer, train_tokenizer
from tests.distributed.tiny import write_corpus
from tests.hf.models import save_model

HAS_OPTIMIZER = importlib.util.find_spec("modelopt") is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny bf16 model with a tokenizer, and conversations beside it."""
    folder = tmp_path_factory.mktemp("quantize")
    text = write_corpus(folder).read_text(encoding="utf-8")
    save_model(folder / "hf", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, head_dim=16)
    save_tokenizer(train_tokenizer([text], 500), folder / "hf")
    return folder / "hf"


def quantize(model, output, kind) -> int:
    words = ["convert", "quantize", model, "--format", kind, "--calibration", model.parent / "corpus.jsonl"]
    return main([*map(str, words), "--output", str(output)])


@pytest.mark.skipif(HAS_OPTIMIZER, reason="nvidia-modelopt is installed")
def test_what_is_missing_is_one_line(model, tmp_path, capsys):
    assert quantize(model, tmp_path / "out", "fp8") == 2
    assert 'pip install "megatron-sfr[quant]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_OPTIMIZER, reason="needs nvidia-modelopt: the extra quant")
@pytest.mark.filterwarnings("default")  # Model Optimizer's own, of layers that its configurations leave alone
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_it_restores_and_is_near_the_original(model, tmp_path, capsys, kind):
    assert quantize(model, tmp_path / kind, kind) == 0
    said = capsys.readouterr().out
    assert 0 < float(re.search(r"rms ([\d.e-]+) of theirs", said)[1]) < 0.5
    assert "calibrated on 35 conversations, restored bit for bit" in said
    assert (tmp_path / kind / "modelopt_state.pth").is_file()
    assert (tmp_path / kind / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / kind / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
