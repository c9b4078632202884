"""Tiny random models of each family, with sizes that divide nothing, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

TINY: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "vocab_size": 503,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "initializer_range": 0.2,
    },
}


def tiny_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """A config that transformers builds a model from."""
    return AutoConfig.for_model(**TINY[architecture] | changes)


def save_model(
    folder: Path,
    architecture: str = "Qwen3ForCausalLM",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a random model whose norms are not all one, with a generation config, as an HF folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
