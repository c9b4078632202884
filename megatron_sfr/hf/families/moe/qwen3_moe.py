"""Qwen3 with experts (Qwen3-30B-A3B, 235B-A22B): Qwen3's attention; in each layer a router and its experts."""

from dataclasses import replace
from functools import partial

from megatron_sfr.hf.config_values import Config, is_true, size
from megatron_sfr.hf.families import dense, qwen3
from megatron_sfr.hf.families.moe import experts
from megatron_sfr.hf.mappings import Dimensions, Family


def dimensions(config: Config) -> Dimensions:
    return replace(
        qwen3.dimensions(config), experts=experts.count(config), expert_ffn=size(config, "moe_intermediate_size")
    )


def flags(config: Config) -> dict[str, object]:
    experts.refuse_dense_layers(config)
    routing = experts.flags(config, dimensions(config), normalized=is_true(config, "norm_topk_prob"))
    return qwen3.flags(config) | routing


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 4},
    Family(
        dimensions=dimensions,
        mappings=partial(dense.mappings, attention=qwen3.NORMS, mlp=experts.QWEN_MLP),
        flags=flags,
        extra_states=partial(experts.extra_states, more=qwen3.NORM_STATES),
    ),
)
