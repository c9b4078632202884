"""The check of logits passes for the same model and fails for one that differs in one weight."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sfr.hf.compare_logits import check_logits
from megatron_sfr.hf.hf_folder import SINGLE
from tests.hf.models import save_model


def test_the_same_model_differs_by_nothing(untied):
    report = check_logits(untied, untied)
    assert report.difference == 0.0
    assert report.logits == 4 * 32 * 503
    assert report.largest > 1


def test_one_other_weight_is_seen(untied, tmp_path):
    for file in untied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(untied / SINGLE)
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] += 0.01
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the model of .*: logits differ by"):
        check_logits(tmp_path, untied)
    assert check_logits(tmp_path, untied, tolerance=0.1).difference > 0


def test_rounding_needs_a_tolerance(tmp_path):
    fp32, bf16 = (save_model(tmp_path / str(x), dtype=x) for x in (torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match="logits differ by"):
        check_logits(bf16, fp32)
    check_logits(bf16, fp32, tolerance=0.05)


def test_another_vocabulary_is_said(untied, tmp_path):
    other = save_model(tmp_path / "hf", vocab_size=505)
    with pytest.raises(ValueError, match="has 505 logits a token"):
        check_logits(other, untied)
