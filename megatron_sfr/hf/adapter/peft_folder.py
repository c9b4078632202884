"""PEFT's folder of an adapter: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_sfr.storage.user_files import read_json_object, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's wrapper of the model, in the names of all tensors."""
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
    plain = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none"}
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"):
        plain[key] = None
    for key in ("trainable_token_indices", "use_qalora", "use_bdlora"):
        plain[key] = None
    for key, value in plain.items():
        if config.get(key) and config[key] != value:
            raise ValueError(f"{folder / CONFIG}: {key} {shown(config[key])}: only plain LoRA of one rank is converted")
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
    return PeftAdapter(rank, float(alpha), {_parse(folder, name): tensor for name, tensor in tensors.items()})


def _parse(folder: Path, name: str) -> tuple[str, str]:
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{folder / WEIGHTS}: {name} is not a matrix of LoRA on a linear layer of the model")
    return f"{found[1]}.weight", found[2]


def first(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
