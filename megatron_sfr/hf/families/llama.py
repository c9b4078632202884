"""Llama 2 and 3: neither bias nor norm of q and k; from 3.1 on, scaled rotary frequencies ("llama3").

megatron-core 0.19.2 has Llama 3.1's function with three of its four numbers fixed, so that only `factor` may differ
(8 in 3.1 and 3.3, 32 in 3.2): the inverse frequencies are transformers' bit for bit
(tests/hf/families/test_families.py).
"""

from megatron_sfr.hf.config_values import Config, is_true, need, number
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.mappings import Family
from megatron_sfr.storage.user_files import shown

FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of RotaryEmbedding._apply_scaling, which no flag changes."""


def flags(config: Config) -> dict[str, object]:
    dense.refuse_window(config)
    dense.refuse_attention_bias(config)
    if is_true(config, "mlp_bias"):
        raise ValueError("mlp_bias: true: Megatron has a bias in the MLP only together with all other layers")
    return dense.flags(config, dense.dimensions(config)) | _scaling(config)


def _scaling(config: Config) -> dict[str, object]:
    if dense.rope_type(config, ("default", "llama3")) == "default":
        return {}
    length = "original_max_position_embeddings"
    outer = {length: config[length]} if length in config else {}  # transformers prefers it to the inner one
    rope = dense.rope_parameters(config) | outer
    for key, value in FIXED.items():
        if rope.get(key) != value:
            raise ValueError(
                f"rope_scaling: llama3 with {key}: {shown(rope.get(key))}: Megatron's --use-rope-scaling computes it "
                f"with {value:g} only"
            )
    need(rope, "factor")
    return {"use_rope_scaling": True, "rope_scaling_factor": float(number(rope, "factor", 1.0))}


FAMILY = Family(dimensions=dense.dimensions, mappings=dense.mappings, flags=flags, extra_states=dense.extra_states)
