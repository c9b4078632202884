"""PEFT's folder of an adapter: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_sfr.storage.user_files import listed, read_json_object, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's wrapper of the model, in the names of all tensors."""
_WITHOUT_EFFECT = frozenset(
    (
        "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
        "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights eva_config "
        "loftq_config corda_config lora_ga_config runtime_config megatron_core megatron_config qalora_group_size "
        "ensure_weight_tying"
    ).split()
)
"""Keys of adapter_config.json that do not change what the matrices of a trained adapter compute."""
_KEEPS_BASE = ("gaussian", "orthogonal", "eva")
"""Starts of an adapter by name that leave the base model's weights as they are."""
_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


def tensor_name(weight: str, matrix: str) -> str:
    """PEFT's name of a matrix, A or B, of an HF weight such as `model.layers.0.mlp.up_proj.weight`."""
    return f"{PREFIX}{weight.removesuffix('.weight')}.lora_{matrix}.weight"


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT folder's contents: matrices by (HF weight, A or B)."""

    rank: int
    alpha: float
    matrices: Mapping[tuple[str, str], Tensor]


def config_of(rank: int, alpha: float, dropout: float, base: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        ranks: the rank of each adapted HF weight; those other than `rank` have the same scale, alpha / rank.
    """
    modules = {weight.removesuffix(".weight"): r for weight, r in ranks.items()}
    others = {_last(module): r for module, r in modules.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "target_modules": sorted({_last(module) for module in modules}),
        "rank_pattern": others,
        "alpha_pattern": {name: _whole(alpha * r / rank) for name, r in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _whole(x: float) -> int | float:
    return int(x) if x == int(x) else x


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft(folder: Path) -> PeftAdapter:
    """Reads a PEFT folder. Raises ValueError for a kind of adapter other than plain LoRA."""
    config = read_json_object(folder / CONFIG, "name the folder that PEFT's save_pretrained wrote")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {shown(config.get('peft_type'))}: only LORA is converted")
    for key, value in config.items():
        if value and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
            raise ValueError(f"{folder / CONFIG}: {key} {shown(value)}: only plain LoRA of one rank is converted")
    if config.get("init_lora_weights") not in (None, True, False, *_KEEPS_BASE):
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights {shown(config['init_lora_weights'])}: it changes the base model's "
            "weights too; let PEFT's save_pretrained convert the adapter to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise ValueError(
            f"{folder / CONFIG}: r is {shown(rank)} and lora_alpha {shown(alpha)}; both have to be positive"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: only safetensors are read")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise ValueError(f"{folder / WEIGHTS}: damaged or cut off ({e}): copy it again") from e
    if not tensors:
        raise ValueError(f"{folder / WEIGHTS} holds no matrix: save the adapter again")
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder / WEIGHTS}: {listed(wrong)}: values are NaN or infinite; copy the adapter again")
    return PeftAdapter(rank, float(alpha), {_parse(folder, name): tensor for name, tensor in tensors.items()})


def _parse(folder: Path, name: str) -> tuple[str, str]:
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{folder / WEIGHTS}: {name} is not a matrix of LoRA on a linear layer of the model")
    return f"{found[1]}.weight", found[2]
