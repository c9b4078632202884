"""Qwen3, dense: RMSNorm on q and k, no bias, heads of width 128 by default."""

from functools import partial

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import Direct, Family

NORMS = (
    Direct(M + "self_attention.q_layernorm.weight", (H + "self_attn.q_norm.weight",), ("head_dim",)),
    Direct(M + "self_attention.k_layernorm.weight", (H + "self_attn.k_norm.weight",), ("head_dim",)),
)
NORM_STATES = (M + "self_attention.q_layernorm", M + "self_attention.k_layernorm")

dimensions = partial(dense.dimensions, head_dim=128)  # Qwen3Config's default; it is not hidden_size / heads


def flags(config: Config) -> dict[str, object]:
    dense.refuse_attention_bias(config)
    dense.refuse_sliding_layers(config)
    dense.rope_type(config)
    return dense.flags(config, dimensions(config)) | {"qk_layernorm": True}


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 32},
    Family(
        dimensions=dimensions,
        mappings=partial(dense.mappings, attention=NORMS),
        flags=flags,
        extra_states=partial(dense.extra_states, more=NORM_STATES),
    ),
)
