"""Checks the folder that engines load against the model it was made of, and computes with its numbers.

`load_folder` gives the plain model what the folder holds: the weights that the stored numbers stand for, and inputs
rounded by the stored scales. Its logits are those of an engine, up to the rounding of sums and of weights to bf16.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.hf.hf_folder import CONFIG, Weights, read_config
from megatron_sfr.hf.quantized.layer_format import WEIGHT, Format
from megatron_sfr.storage.user_files import read_json_object, shown

HF_QUANT_CONFIG = "hf_quant_config.json"
METHOD = "modelopt"


@dataclass(frozen=True)
class WeightErrors:
    """Root mean square of each quantized weight's error, relative to that of the weight."""

    weights: int
    """Number of quantized weights."""
    median: float
    worst: float
    worst_name: str


def write_config(folder: Path, source: Path) -> None:
    """Writes the source's config.json with the quantization_config of Model Optimizer's.

    save_pretrained writes a model's config in the form of the installed transformers. Engines need not know that form;
    they know the source's.
    """
    config = read_config(source)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    quantization = read_config(folder).get("quantization_config")
    text = json.dumps({**config, key: "bfloat16", "quantization_config": quantization}, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load_folder(model: Any, folder: Path, format: Format) -> WeightErrors:
    """Gives the original model, in bf16, the numbers of a folder. Returns the error of the weights.

    Raises:
        ValueError: a tensor or a config is not as the format has it, or a weight is too far from the original's.
    """
    weights = Weights(folder)
    layers = linear_layers(model)
    _check_configs(folder, format)
    expected = {name for name, _ in model.named_parameters()}
    for name, module in layers.items():
        expected |= {f"{name}.{part}" for part in format.layout(*module.weight.shape)}
    if differing := sorted(expected ^ weights.files.keys()):
        raise ValueError(f"{folder}: {differing[0]} is {'missing' if differing[0] in expected else 'unknown'}")
    errors: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if layer not in layers or part != WEIGHT:
            if not torch.equal(weights[name], parameter.cpu()):
                raise ValueError(f"{folder}: {name} is not quantized, but differs from the original's in bf16")
            continue
        stored = _read_layer(weights, layer, format, parameter)
        values = format.values(stored).to(parameter.device)
        errors[name] = _relative_error(values, parameter.float())
        if not errors[name] <= format.tolerance:
            raise ValueError(f"{folder}: {name} is off by {errors[name]:.3g} of itself, {format.algorithm} by less")
        parameter.copy_(values)
        layers[layer].register_forward_pre_hook(partial(_round_input, format=format, stored=stored))
    worst = max(errors, key=errors.__getitem__)
    return WeightErrors(len(errors), median(errors.values()), errors[worst], worst)


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers that are quantized, by name: all linear ones except the output layer."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }


def _check_configs(folder: Path, format: Format) -> None:
    """Raises ValueError unless both files name the method that engines read the folder with."""
    config = read_config(folder).get("quantization_config")
    details = read_json_object(folder / HF_QUANT_CONFIG).get("quantization")
    found = [config.get("quant_method"), config.get("quant_algo")] if isinstance(config, dict) else [None, None]
    found.append(details.get("quant_algo") if isinstance(details, dict) else None)
    if found != [METHOD, format.algorithm, format.algorithm]:
        raise ValueError(f"{folder}: {CONFIG} and {HF_QUANT_CONFIG} name {shown(found)}, not {format.algorithm}")


def _read_layer(weights: Weights, name: str, format: Format, parameter: Tensor) -> dict[str, Tensor]:
    stored = {}
    for part, (dtype, shape) in format.layout(*parameter.shape).items():
        tensor = stored[part] = weights[f"{name}.{part}"]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            actual = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{weights.folder}: {name}.{part} is {actual}, not {dtype} {list(shape)}")
        scale = tensor.float()
        if part != WEIGHT and not (bool(scale.isfinite().all()) and bool((scale > 0).all())):
            raise ValueError(f"{weights.folder}: {name}.{part} has scales that are not positive")
    return stored


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def _round_input(
    module: Any, inputs: tuple[Tensor, ...], *, format: Format, stored: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    return (format.rounded_input(inputs[0], stored), *inputs[1:])
