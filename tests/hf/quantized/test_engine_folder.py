"""A folder for engines is read by its documented layout; one with another tensor, scale or config is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sfr.hf.hf_folder import CONFIG, SINGLE
from megatron_sfr.hf.quantized.engine_folder import HF_QUANT_CONFIG, linear_layers, load_folder
from megatron_sfr.hf.quantized.layer_format import FORMATS
from megatron_sfr.hf.quantized.number_formats import E4M3, round_fp8
from tests.hf.models import save_model

UP = "model.layers.1.mlp.up_proj"
TOKENS = torch.randint(503, (2, 20), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture
def fp8(source: Path, tmp_path: Path) -> Path:
    """Written here by the layout: E4M3 weights with one scale, and one scale of the inputs."""
    tensors = {name: x.clone() for name, x in load(source).state_dict().items() if name != "lm_head.weight"}
    for name in linear_layers(load(source)):
        weight = tensors[f"{name}.weight"].float()
        scale = weight.abs().max() / 448
        tensors[f"{name}.weight"] = (weight / scale).to(E4M3)
        tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"] = scale, torch.tensor(0.05)
    save_file(tensors, tmp_path / SINGLE)
    config = json.loads((source / CONFIG).read_text())
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"quantization_config": quantization}))
    (tmp_path / HF_QUANT_CONFIG).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    return tmp_path


@torch.no_grad()
def test_the_model_computes_with_the_stored_numbers(source: Path, fp8: Path) -> None:
    model = load(source)
    original = model(TOKENS).logits
    errors = load_folder(model, fp8, FORMATS["fp8"])
    assert errors.weights == 4 * 7
    assert 0.01 < errors.median <= errors.worst < 0.04  # a step of E4M3 is 2^-3 of its power of two
    stored = load_file(fp8 / SINGLE)
    layer = model.get_submodule(UP)
    values = stored[f"{UP}.weight"].float() * stored[f"{UP}.weight_scale"]
    assert torch.equal(layer.weight, values.bfloat16())
    x = torch.randn(5, 36, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(layer(x), round_fp8(x, torch.tensor(0.05)) @ layer.weight.T)
    assert 0 < (model(TOKENS).logits - original).abs().max() < original.abs().max()


def pop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


DAMAGE = {
    "no input scale": (pop(f"{UP}.input_scale"), "up_proj.input_scale is missing"),
    "another tensor": (lambda x: x.update(extra=torch.ones(1)), "extra is unknown"),
    "not quantized": (put(f"{UP}.weight", lambda x: x.bfloat16()), "up_proj.weight is torch.bfloat16 .*, not torch.fl"),
    "scales per channel": (put(f"{UP}.weight_scale", lambda x: x.repeat(44)), r"weight_scale is .*\[44\], not .*\[\]"),
    "a negative scale": (put(f"{UP}.weight_scale", lambda x: -x), "up_proj.weight_scale has scales that are not posi"),
    "a scale that is not a number": (
        put(f"{UP}.input_scale", lambda x: x * torch.nan),
        "input_scale has scales that are",
    ),
    "another scale": (put(f"{UP}.weight_scale", lambda x: 1.1 * x), r"up_proj.weight is off by 0.10\d* of itself"),
    "another norm": (put("model.norm.weight", lambda x: x + 1), "model.norm.weight is not quantized, but differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_another_tensor_is_refused(name: str, source: Path, fp8: Path) -> None:
    change, message = DAMAGE[name]
    tensors = load_file(fp8 / SINGLE)
    change(tensors)
    save_file(tensors, fp8 / SINGLE)
    with pytest.raises(ValueError, match=message):
        load_folder(load(source), fp8, FORMATS["fp8"])


@pytest.mark.parametrize("file", [CONFIG, HF_QUANT_CONFIG])
def test_both_configs_name_the_algorithm(file: str, source: Path, fp8: Path) -> None:
    config = json.loads((fp8 / file).read_text())
    config["quantization_config" if file == CONFIG else "quantization"]["quant_algo"] = "NVFP4"
    (fp8 / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json and hf_quant_config\.json name .*NVFP4.*, not FP8"):
        load_folder(load(source), fp8, FORMATS["fp8"])
