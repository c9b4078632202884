"""Mistral, dense: Llama's layers; in 0.1 each attends to a window of the last `sliding_window` tokens, itself included.

`sliding_window: null` (0.2 and later) is full attention. A window of W becomes --window-size W-1,0: W-1 tokens to the
left, none to the right. Both Transformer Engine and the local spec support it. The local spec's fused softmax on CUDA
ignores it (megatron-core 0.19.2) and is therefore disabled. The window has no effect on sequences of at most W tokens.
"""

from megatron_sfr.hf.config_values import LARGEST, Config
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.mappings import Family
from megatron_sfr.storage.user_files import shown


def flags(config: Config) -> dict[str, object]:
    if config.get("layer_types"):
        raise ValueError("layer_types: MistralForCausalLM has one kind of layer and ignores it: is this another model?")
    dense.rope_type(config)
    return dense.flags(config, dense.dimensions(config)) | window(config)


def window(config: Config) -> dict[str, object]:
    """The flags of `sliding_window`, which all layers have."""
    tokens = config.get("sliding_window")
    if tokens is None:
        return {}
    if type(tokens) is not int or not 1 <= tokens <= LARGEST:
        raise ValueError(
            f"sliding_window: {shown(tokens)}: it has to be a number of tokens, or null for full attention"
        )
    return {"window_size": f"{tokens - 1},0", "no_masked_softmax_fusion": True}


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 8, "sliding_window": 4096},
    Family(dimensions=dense.dimensions, mappings=dense.mappings, flags=flags, extra_states=dense.extra_states),
)
