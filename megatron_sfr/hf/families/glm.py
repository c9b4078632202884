"""GLM-4 9B and GLM-Edge (GlmForCausalLM): biases of q, k and v, fused gate and up projection, rotary pairs interleaved.

By default rotary embedding applies to half of each head. Glm4ForCausalLM (0414) has norms after attention and MLP,
which megatron-core's GPTModel does not have.
"""

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families import dense, fused_weights
from megatron_sfr.hf.mappings import Dimensions, Family, ParameterMapping


def dimensions(config: Config) -> Dimensions:
    return dense.dimensions(config, head_dim=128)  # GlmConfig's default


def mappings(config: Config) -> tuple[ParameterMapping, ...]:
    bias = (dense.QKV_BIAS,) if dense.has_qkv_bias(config) else ()
    return dense.mappings(config, attention=bias, mlp=fused_weights.MLP)


def flags(config: Config) -> dict[str, object]:
    dense.refuse_window(config)
    dense.rope_type(config)
    return dense.flags(config, dimensions(config), partial_rotary=True) | {
        "rotary_percent": dense.rotary_share(config, default=0.5),
        "rotary_interleaved": True,
        "add_qkv_bias": dense.has_qkv_bias(config),
    }


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
    Family(dimensions=dimensions, mappings=mappings, flags=flags, extra_states=dense.extra_states),
)
