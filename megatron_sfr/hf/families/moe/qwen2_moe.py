"""Qwen1.5 and Qwen2 with experts (Qwen2MoeForCausalLM): Qwen2's attention, experts, and one that all tokens share.

The shared expert's output is weighted by a separate sigmoid gate, which Megatron computes (--moe-shared-expert-gate).
"""

from dataclasses import replace
from functools import partial

from megatron_sfr.hf.config_values import Config, is_true, size
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.families.moe import experts
from megatron_sfr.hf.mappings import Dimensions, Direct, Family, GatedMLP

_S, _HS = M + "mlp.shared_experts.", H + "mlp.shared_expert."
SHARED = (
    GatedMLP(_S + "linear_fc1.weight", (_HS + "gate_proj.weight", _HS + "up_proj.weight"), "shared_ffn"),
    Direct(_S + "linear_fc2.weight", (_HS + "down_proj.weight",), ("hidden", "shared_ffn"), 1),
    Direct(_S + "gate_weight", (H + "mlp.shared_expert_gate.weight",), ("one", "hidden")),
)


def dimensions(config: Config) -> Dimensions:
    return replace(
        dense.dimensions(config),
        experts=experts.count(config),
        expert_ffn=size(config, "moe_intermediate_size"),
        shared_ffn=size(config, "shared_expert_intermediate_size"),
    )


def flags(config: Config) -> dict[str, object]:
    experts.refuse_dense_layers(config)
    dense.refuse_sliding_layers(config)
    dense.rope_type(config)
    if config.get("qkv_bias") is False:
        raise ValueError("qkv_bias: false: models of this family without biases are not converted")
    d = dimensions(config)
    return {
        **dense.flags(config, d),
        **experts.flags(config, d, normalized=is_true(config, "norm_topk_prob")),
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": d.shared_ffn,
        "moe_shared_expert_gate": True,
    }


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 16},
    Family(
        dimensions=dimensions,
        mappings=partial(dense.mappings, attention=(dense.QKV_BIAS,), mlp=(*experts.QWEN_MLP, *SHARED)),
        flags=flags,
        extra_states=partial(experts.extra_states, more=(_S + "linear_fc1", _S + "linear_fc2")),
    ),
)
