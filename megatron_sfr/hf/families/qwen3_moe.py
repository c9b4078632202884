"""Qwen3 with experts (Qwen3-30B-A3B, 235B-A22B): Qwen3's attention; in each layer a router and its experts.

Upstream's grouped experts (Transformer Engine) and its sequential ones (the local spec) save the same names, tensors of
[layers, experts, ...]: megatron-core 0.19.2 says so of itself, and only the sequential ones were tried here.
"""

from dataclasses import replace
from functools import partial

from megatron_sfr.hf.families import dense, qwen3
from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import EXPERT, Config, Dimensions, Direct, Family, GatedMLP, is_true, size

E = f"{H}mlp.experts.{EXPERT}."
MLP = (
    Direct(M + "pre_mlp_layernorm.weight", (H + "post_attention_layernorm.weight",), ("hidden",)),
    Direct(M + "mlp.router.weight", (H + "mlp.gate.weight",), ("experts", "hidden")),
    GatedMLP(
        M + "mlp.experts.experts.linear_fc1.weight",
        (E + "gate_proj.weight", E + "up_proj.weight"),
        "expert_ffn",
    ),
    Direct(M + "mlp.experts.experts.linear_fc2.weight", (E + "down_proj.weight",), ("hidden", "expert_ffn"), 1),
)


def dimensions(config: Config) -> Dimensions:
    name = "num_experts" if config.get("num_experts") else "num_local_experts"  # transformers 5 renamed it
    return replace(
        qwen3.dimensions(config), experts=size(config, name), expert_ffn=size(config, "moe_intermediate_size")
    )


def flags(config: Config) -> dict[str, object]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers, decoder_sparse_step: layers without experts among them are not converted")
    d = dimensions(config)
    return qwen3.flags(config) | {
        "num_experts": d.experts,
        "moe_ffn_hidden_size": d.expert_ffn,
        "moe_router_topk": size(config, "num_experts_per_tok"),
        # Softmax of the chosen alone is softmax of all, normalised over the chosen.
        "moe_router_pre_softmax": not is_true(config, "norm_topk_prob"),
        "moe_router_score_function": "softmax",
        "moe_token_dispatcher_type": "alltoall",
    }


FAMILY = Family(
    dimensions=dimensions,
    rows=partial(dense.rows, attention=qwen3.NORMS, mlp=MLP),
    flags=flags,
    extra_states=(
        *dense.ATTENTION_STATES,
        M + "self_attention.q_layernorm",
        M + "self_attention.k_layernorm",
        M + "pre_mlp_layernorm",
        M + f"mlp.experts.experts.{EXPERT}.linear_fc1",
        M + f"mlp.experts.experts.{EXPERT}.linear_fc2",
    ),
)
