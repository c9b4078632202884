"""SmolLM3: Llama's layers; every fourth one has no positions, or those that `no_rope_layers` marks with 0."""

from megatron_sfr.hf.config_values import Config, is_true, size
from megatron_sfr.hf.families import dense
from megatron_sfr.hf.mappings import Dimensions, Family
from megatron_sfr.storage.user_files import shown


def flags(config: Config) -> dict[str, object]:
    dense.refuse_attention_bias(config)
    dense.refuse_sliding_layers(config)
    dense.rope_type(config)
    if is_true(config, "mlp_bias"):
        raise ValueError("mlp_bias: true: Megatron has a bias in the MLP only together with all other layers")
    d = dense.dimensions(config)
    return dense.flags(config, d) | {"no_rope_freq": f"[{','.join(map(str, without_positions(config, d)))}]"}


def without_positions(config: Config, d: Dimensions) -> list[int]:
    """For each layer, 1 if it has no positions. Hugging Face marks the layers that have them."""
    layers = config.get("no_rope_layers")
    if layers is None:
        interval = size(config, "no_rope_layer_interval", 4)
        layers = [int((layer + 1) % interval != 0) for layer in range(d.layers)]
    if not isinstance(layers, list) or len(layers) != d.layers or not set(map(str, layers)) <= {"0", "1"}:
        raise ValueError(
            f"config.json: no_rope_layers is {shown(layers)}; it has to be a list of {d.layers} zeros and ones"
        )
    return [1 - layer for layer in layers]


FAMILY = dense.with_defaults(
    {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    Family(dimensions=dense.dimensions, mappings=dense.mappings, flags=flags, extra_states=dense.extra_states),
)
