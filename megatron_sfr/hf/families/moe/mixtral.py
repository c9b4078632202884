"""Mixtral (8x7B, 8x22B): Mistral's attention and experts; the weights of the experts that a token uses sum to 1."""

from dataclasses import replace
from functools import partial

from megatron_sfr.hf.config_values import Config, size
from megatron_sfr.hf.families import dense, mistral
from megatron_sfr.hf.families.moe import experts
from megatron_sfr.hf.mappings import EXPERT, Dimensions, Family

_E = f"block_sparse_moe.experts.{EXPERT}."
MLP = experts.mlp("block_sparse_moe.gate.weight", _E + "w1.weight", _E + "w3.weight", _E + "w2.weight")


def dimensions(config: Config) -> Dimensions:
    d = dense.dimensions(config)
    return replace(d, experts=size(config, "num_local_experts", 8), expert_ffn=d.ffn)


def flags(config: Config) -> dict[str, object]:
    dense.rope_type(config)
    d = dimensions(config)
    routing = experts.flags({"num_experts_per_tok": 2} | config, d, normalized=True)
    return dense.flags(config, d) | mistral.window(config) | routing


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    Family(
        dimensions=dimensions,
        mappings=partial(dense.mappings, mlp=MLP),
        flags=flags,
        extra_states=experts.extra_states,
    ),
)
