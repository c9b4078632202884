"""Seed-OSS: q, k and v have a bias, the output projection has none."""

from megatron_sfr.hf.config_values import Config, is_true, number
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.mappings import Family, ParameterMapping


def mappings(config: Config) -> tuple[ParameterMapping, ...]:
    return dense.mappings(config, attention=(dense.QKV_BIAS,) if dense.has_qkv_bias(config) else ())


def flags(config: Config) -> dict[str, object]:
    dense.refuse_window(config)
    for key in ("attention_out_bias", "mlp_bias"):
        if is_true(config, key):
            raise ValueError(f"{key}: true: Megatron has this bias only together with those of all other layers")
    dense.rope_type(config)
    return dense.flags(config, dense.dimensions(config)) | {
        "add_qkv_bias": dense.has_qkv_bias(config),
        "attention_dropout": float(number(config, "attention_dropout", 0.1)),
        "hidden_dropout": float(number(config, "residual_dropout", 0.1)),
    }


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 8, "head_dim": 128},
    Family(dimensions=dense.dimensions, mappings=mappings, flags=flags, extra_states=dense.extra_states),
)
