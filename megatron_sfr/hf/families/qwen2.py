"""Qwen2 and Qwen2.5, dense: q, k and v have a bias, whatever the config says, and no norm."""

from functools import partial

from megatron_sfr.hf.families import dense
from megatron_sfr.hf.families.dense import H, M
from megatron_sfr.hf.mappings import QKV, Config, Family

BIAS = QKV(
    M + "self_attention.linear_qkv.bias",
    (H + "self_attn.q_proj.bias", H + "self_attn.k_proj.bias", H + "self_attn.v_proj.bias"),
    (),
)


def flags(config: Config) -> dict[str, object]:
    dense.refuse_sliding_layers(config)
    dense.rope_type(config)
    return dense.flags(config, dense.dimensions(config)) | {"add_qkv_bias": True}


FAMILY = Family(
    dimensions=dense.dimensions,
    rows=partial(dense.rows, attention=(BIAS,)),
    flags=flags,
    extra_states=dense.EXTRA_STATES,
)
