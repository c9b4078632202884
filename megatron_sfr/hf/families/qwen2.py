"""Qwen2 and Qwen2.5, dense: q, k and v always have a bias and no norm."""

from functools import partial

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.mappings import Family


def flags(config: Config) -> dict[str, object]:
    dense.refuse_sliding_layers(config)
    dense.rope_type(config)
    return dense.flags(config, dense.dimensions(config)) | {"add_qkv_bias": True}


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 32},
    Family(
        dimensions=dense.dimensions,
        mappings=partial(dense.mappings, attention=(dense.QKV_BIAS,)),
        flags=flags,
        extra_states=dense.extra_states,
    ),
)
