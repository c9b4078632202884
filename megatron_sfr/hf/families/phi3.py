"""Phi-3 and Phi-4 (Phi3ForCausalLM): Llama with fused weights; rotary embedding may apply to a part of each head.

Long-context variants scale their rotary frequencies by a table (`longrope`), which Megatron does not compute.
"""

from functools import partial

from megatron_sfr.hf.config_values import Config, number
from megatron_sfr.hf.families import dense, fused_weights, mistral
from megatron_sfr.hf.mappings import Family


def flags(config: Config) -> dict[str, object]:
    dense.rope_type(config)
    for key in ("resid_pdrop", "embd_pdrop"):
        if number(config, key, 0.0):
            raise ValueError(f"{key}: {config[key]}: only 0 is converted; Megatron's --hidden-dropout acts elsewhere")
    said = dense.flags(config, dense.dimensions(config), partial_rotary=True) | mistral.window(config)
    return said | {"rotary_percent": dense.rotary_share(config)}


FAMILY = dense.with_defaults(
    {"rms_norm_eps": 1e-5},
    Family(
        dimensions=dense.dimensions,
        mappings=partial(dense.mappings, qkv=fused_weights.QKV, mlp=fused_weights.MLP),
        flags=flags,
        extra_states=dense.extra_states,
    ),
)
