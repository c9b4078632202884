"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano (NemotronHForCausalLM): layers of Mamba-2, attention, MLPs, experts.

Attention has no positions; MLPs and experts have no gate and square their ReLU. Each layer has one norm, before it.
transformers 5.23 keeps Mamba's time steps at `time_step_min` or more, Megatron and Mamba's own kernels do not.
"""

from dataclasses import replace
from math import inf
from typing import Any

from megatron_sfr.hf.config_values import MOST, Config, number, size
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import M
from megatron_sfr.hf.families.hybrid import layers
from megatron_sfr.hf.families.hybrid.layers import ATTENTION, EXPERTS, MAMBA, MLP, HybridDimensions
from megatron_sfr.hf.families.moe import experts
from megatron_sfr.hf.mappings import EXPERT, QKV, Direct, Family, ParameterMapping
from megatron_sfr.storage.user_files import shown

H = "backbone.layers.{layer}."
_X, _NORM = H + "mixer.", H + "norm.weight"
_E, _S = M + "mlp.experts.experts.", M + "mlp.shared_experts."
RECORDS: dict[str, layers.Records] = {
    MAMBA: layers.mamba(_NORM, _X),
    ATTENTION: (
        Direct(M + "self_attention.linear_qkv.layer_norm_weight", (_NORM,), ("hidden",)),
        QKV(
            M + "self_attention.linear_qkv.weight",
            (_X + "q_proj.weight", _X + "k_proj.weight", _X + "v_proj.weight"),
            ("hidden",),
        ),
        Direct(M + "self_attention.linear_proj.weight", (_X + "o_proj.weight",), ("hidden", "query"), 1),
    ),
    MLP: (
        Direct(M + "mlp.linear_fc1.layer_norm_weight", (_NORM,), ("hidden",)),
        Direct(M + "mlp.linear_fc1.weight", (_X + "up_proj.weight",), ("ffn", "hidden"), 0),
        Direct(M + "mlp.linear_fc2.weight", (_X + "down_proj.weight",), ("hidden", "ffn"), 1),
    ),
    EXPERTS: (
        Direct(M + "pre_mlp_layernorm.weight", (_NORM,), ("hidden",)),
        Direct(M + "mlp.router.weight", (_X + "gate.weight",), ("experts", "hidden")),
        Direct(M + "mlp.router.expert_bias", (_X + "gate.e_score_correction_bias",), ("experts",)),
        Direct(_E + "linear_fc1.weight", (_X + f"experts.{EXPERT}.up_proj.weight",), ("expert_ffn", "hidden"), 0),
        Direct(_E + "linear_fc2.weight", (_X + f"experts.{EXPERT}.down_proj.weight",), ("hidden", "expert_ffn"), 1),
        Direct(_S + "linear_fc1.weight", (_X + "shared_experts.up_proj.weight",), ("shared_ffn", "hidden"), 0),
        Direct(_S + "linear_fc2.weight", (_X + "shared_experts.down_proj.weight",), ("hidden", "shared_ffn"), 1),
    ),
}
KINDS = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "mlp": MLP,
    "moe": EXPERTS,
}
"""Names of the kinds of layers in `layers_block_type`, of transformers 5 and before."""
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "conv_kernel": (4,),
    "hidden_dropout": (0,),
    "mamba_hidden_act": ("silu",),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "mlp_hidden_act": ("relu2",),
    "moe_latent_size": (),
    "n_group": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "num_nextn_predict_layers": (0,),
    "residual_in_fp32": (False,),
    "sliding_window": (),
    "tie_word_embeddings": (False,),
    "time_step_limit": ([0, inf], [0, {"__float__": "Infinity"}]),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}
"""Values that are converted, besides a missing key or null: those that Megatron and transformers both compute."""


def pattern(config: Config) -> str:
    """The kinds of the layers, by Megatron's symbols."""
    listed, written = config.get("layers_block_type", config.get("layer_types")), config.get("hybrid_override_pattern")
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(x, str) and x in KINDS for x in listed):
            raise ValueError(
                f"config.json: layers_block_type is {shown(listed)}; it has to be a list of {', '.join(KINDS)}"
            )
        found = "".join(KINDS[x] for x in listed)
    elif isinstance(written, str) and set(written) <= RECORDS.keys():
        found = written
    else:
        raise ValueError(
            f"config.json: hybrid_override_pattern is {shown(written)}; it has to be of {', '.join(RECORDS)}"
        )
    if written not in (None, found) or config.get("num_hidden_layers") not in (None, len(found)):
        raise ValueError(
            "config.json: layers_block_type, hybrid_override_pattern and num_hidden_layers describe different layers"
        )
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"config.json: it has {len(found)} layers; there have to be 1 to {MOST:,}")
    return found


def dimensions(config: Config) -> HybridDimensions:
    head_dim = config.get("head_dim", config.get("attention_head_dim"))  # the name in the first models
    base = dense.dimensions(config | {"num_hidden_layers": len(pattern(config)), "head_dim": head_dim}, head_dim=128)
    if EXPERTS in pattern(config):
        base = replace(
            base,
            experts=size(config, "n_routed_experts"),
            expert_ffn=size(config, "moe_intermediate_size"),
            shared_ffn=size(config, "moe_shared_expert_intermediate_size"),
        )
    d = HybridDimensions(
        **vars(base),
        mamba_heads=size(config, "mamba_num_heads", 128),
        mamba_head_dim=size(config, "mamba_head_dim", 64),
        mamba_groups=size(config, "n_groups", 8),
        state=size(config, "ssm_state_size", 128),
    )
    if d.mamba_heads % d.mamba_groups:
        raise ValueError(f"config.json: n_groups {d.mamba_groups} does not divide mamba_num_heads {d.mamba_heads}")
    return d


def mappings(config: Config) -> tuple[ParameterMapping, ...]:
    rows, norm = ("vocab", "hidden"), layers.NORM + ".weight"
    return (
        Direct("embedding.word_embeddings.weight", ("backbone.embeddings.weight",), rows, 0, padded=True),
        *layers.in_each_layer(pattern(config), RECORDS),
        Direct(norm, ("backbone.norm_f.weight",), ("hidden",)),
        Direct("output_layer.weight", ("lm_head.weight",), rows, 0, padded=True),
    )


def flags(config: Config) -> dict[str, object]:
    kinds, d, epsilon = pattern(config), dimensions(config), number(config, "layer_norm_epsilon", 1e-5)
    for key, values in ONLY.items():
        if (value := config.get(key)) is not None and value not in values:
            said = " or ".join(map(shown, values)) or "null"
            raise ValueError(f"{key}: {shown(value)}: Megatron or transformers computes {said} only for this family")
    if MAMBA in kinds and epsilon != 1e-5:
        raise ValueError(f"layer_norm_epsilon: {epsilon}: the norm in Megatron's Mamba layers has 1e-05")
    return {
        "model_class": "hybrid",
        "hybrid_layer_pattern": kinds,
        **dense.shape_flags(config, d),
        "squared_relu": True,
        "norm_epsilon": epsilon,
        "position_embedding_type": "none",
        **(_mamba_flags(d) if MAMBA in kinds else {}),
        **(_expert_flags(config, d) if EXPERTS in kinds else {}),
    }


def _mamba_flags(d: HybridDimensions) -> dict[str, object]:
    return {
        "mamba_num_heads": d.mamba_heads,
        "mamba_head_dim": d.mamba_head_dim,
        "mamba_num_groups": d.mamba_groups,
        "mamba_state_dim": d.state,
    }


def _expert_flags(config: Config, d: HybridDimensions) -> dict[str, object]:
    return experts.flags(config, d, normalized=True) | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": float(number(config, "routed_scaling_factor", 1.0)),
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": d.shared_ffn,
    }


def extra_states(config: Config) -> tuple[str, ...]:
    return layers.states(pattern(config), (*experts.STATES, _S + "linear_fc1", _S + "linear_fc2"))


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 8},
    Family(dimensions=dimensions, mappings=mappings, flags=flags, extra_states=extra_states),
)
