"""Tiny random models of each family, with sizes that divide nothing, written by transformers itself."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

SHARED: dict[str, Any] = {
    "vocab_size": 503,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "initializer_range": 0.2,
}
NEMOTRON_H = "NemotronHForCausalLM"
TINY: dict[str, dict[str, Any]] = {
    "GlmForCausalLM": SHARED
    | {
        "model_type": "glm",
        "head_dim": 12,
        "pad_token_id": 0,
        "rope_parameters": SHARED["rope_parameters"] | {"partial_rotary_factor": 0.5},
    },
    "LlamaForCausalLM": SHARED | {"model_type": "llama", "head_dim": 10},
    "MistralForCausalLM": SHARED | {"model_type": "mistral", "head_dim": 10, "sliding_window": None},
    "MixtralForCausalLM": SHARED
    | {"model_type": "mixtral", "head_dim": 10, "num_local_experts": 6, "num_experts_per_tok": 3},
    NEMOTRON_H: {
        "model_type": "nemotron_h",
        "vocab_size": 503,
        "hidden_size": 36,
        "intermediate_size": 44,
        "hybrid_override_pattern": "M-*ME-M",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 96,
        "initializer_range": 0.2,
        "ssm_state_size": 5,
        "mamba_num_heads": 8,
        "mamba_head_dim": 7,
        "n_groups": 4,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 28,
        "routed_scaling_factor": 2.5,
    },
    "Phi3ForCausalLM": SHARED | {"model_type": "phi3", "pad_token_id": 0},
    "Qwen2ForCausalLM": SHARED | {"model_type": "qwen2"},  # heads of 36 / 6
    "Qwen2MoeForCausalLM": SHARED
    | {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "Qwen3ForCausalLM": SHARED | {"model_type": "qwen3", "head_dim": 10},
    "Qwen3MoeForCausalLM": SHARED
    | {
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "moe_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "SeedOssForCausalLM": SHARED
    | {"model_type": "seed_oss", "head_dim": 10, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "SmolLM3ForCausalLM": SHARED | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1], "pad_token_id": 0},
}
LLAMA3 = {  # of Llama 3.2; at the tiny model's base it leaves, blends and divides some frequency each
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3's frequencies": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "Mistral 0.1's window": ("MistralForCausalLM", {"sliding_window": 17}),
    "every head its own group": ("LlamaForCausalLM", {"num_key_value_heads": 6, "head_dim": None}),
    "experts, not normalized": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
    "a part of each head turned": (
        "Phi3ForCausalLM",
        {
            "hidden_size": 48,
            "rope_parameters": SHARED["rope_parameters"] | {"partial_rotary_factor": 0.75},
            "sliding_window": 17,
        },
    ),
    "layers of attention and MLPs": (NEMOTRON_H, {"hybrid_override_pattern": "*--*"}),
    "one group": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
}
"""What a config of a family may say besides."""
CASES = {
    **{
        f"{x}, tied: {tied}": (x, {"tie_word_embeddings": tied})
        for x in TINY
        for tied in ((False,) if x == NEMOTRON_H else (False, True))
    },
    **VARIANTS,
}
"""Every kind of model: its architecture, and what its config changes."""
COMPUTED = [case for case in CASES if case != f"{NEMOTRON_H}, tied: False"]
"""Those without Mamba layers, which upstream computes on GPUs only."""


def tiny_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """A config that transformers builds a model from."""
    return AutoConfig.for_model(**deepcopy(TINY[architecture] | changes))  # it changes what it gets


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
