"""Mappings and flags of the dense decoder that the families share: pre-norm, rotary positions, SiLU-gated MLP.

A family's own file holds what it adds and what else it refuses. Transformer Engine's layer spec and the local one write
the same names: upstream saves the local spec's norms as `linear_qkv.layer_norm_*` and `linear_fc1.layer_norm_*`.
"""

import json
from collections.abc import Callable, Sequence

from megatron_sfr.hf.config_values import LARGEST, Config, is_true, mapping, number, size
from megatron_sfr.hf.mappings import QKV, Dimensions, Direct, Family, GatedMLP, ParameterMapping
from megatron_sfr.storage.user_files import cut, shown

M, H = "decoder.layers.{layer}.", "model.layers.{layer}."
"""Prefixes of a layer's names in Megatron and in Hugging Face."""

_EMBEDDING = Direct(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), 0, padded=True
)
_INPUT_NORM = Direct(M + "self_attention.linear_qkv.layer_norm_weight", (H + "input_layernorm.weight",), ("hidden",))
_QKV = QKV(
    M + "self_attention.linear_qkv.weight",
    (H + "self_attn.q_proj.weight", H + "self_attn.k_proj.weight", H + "self_attn.v_proj.weight"),
    ("hidden",),
)
QKV_BIAS = QKV(
    M + "self_attention.linear_qkv.bias",
    (H + "self_attn.q_proj.bias", H + "self_attn.k_proj.bias", H + "self_attn.v_proj.bias"),
    (),
)
_PROJECTION = Direct(M + "self_attention.linear_proj.weight", (H + "self_attn.o_proj.weight",), ("hidden", "query"), 1)
_MLP = (
    Direct(M + "mlp.linear_fc1.layer_norm_weight", (H + "post_attention_layernorm.weight",), ("hidden",)),
    GatedMLP(M + "mlp.linear_fc1.weight", (H + "mlp.gate_proj.weight", H + "mlp.up_proj.weight")),
    Direct(M + "mlp.linear_fc2.weight", (H + "mlp.down_proj.weight",), ("hidden", "ffn"), 1),
)
_NORM = Direct("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",))
_OUTPUT = Direct("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), 0, padded=True)

ATTENTION_STATES = tuple(M + f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention"))
MLP_STATES = (M + "mlp.linear_fc1", M + "mlp.linear_fc2")
NORM_STATE = "decoder.final_layernorm"
"""Modules with an extra state, by the part of the model."""


def extra_states(config: Config, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules with an extra state. more: those that a family adds."""
    return (*ATTENTION_STATES, NORM_STATE, *MLP_STATES, *more)


def with_defaults(defaults: Config, family: Family) -> Family:
    """The family, with transformers' defaults for keys that config.json leaves out.

    Only keys whose default differs from that of the other families need to be listed.
    """

    def completed[T](read: Callable[[Config], T]) -> Callable[[Config], T]:
        return lambda config: read({**defaults, **config})

    return Family(
        dimensions=completed(family.dimensions),
        mappings=completed(family.mappings),
        flags=completed(family.flags),
        extra_states=completed(family.extra_states),
        tied=family.tied,
    )


def mappings(
    config: Config,
    attention: tuple[ParameterMapping, ...] = (),
    mlp: tuple[ParameterMapping, ...] = _MLP,
    qkv: ParameterMapping = _QKV,
) -> tuple[ParameterMapping, ...]:
    """All mappings of a model.

    Args:
        attention: what a family has after the weight of q, k and v: biases, norms.
        mlp: all of a layer after its attention.
        qkv: the weight of q, k and v.
    """
    output = () if is_tied(config) else (_OUTPUT,)
    return (_EMBEDDING, _INPUT_NORM, qkv, *attention, _PROJECTION, *mlp, _NORM, *output)


def is_tied(config: Config) -> bool:
    return is_true(config, "tie_word_embeddings")


def dimensions(config: Config, head_dim: int | None = None) -> Dimensions:
    """Sizes of the model. head_dim is the default size of a head (None: hidden_size / heads)."""
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    groups = size(config, "num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"config.json: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    return Dimensions(
        layers=size(config, "num_hidden_layers"),
        vocab=size(config, "vocab_size"),
        hidden=hidden,
        ffn=size(config, "intermediate_size"),
        heads=heads,
        groups=groups,
        head_dim=size(config, "head_dim", head_dim or max(1, hidden // heads)),
    )


def flags(config: Config, d: Dimensions, partial_rotary: bool = False) -> dict[str, object]:
    """Megatron's flags that all families share. Raises ValueError for what Megatron would compute differently.

    Args:
        partial_rotary: whether the family reads `partial_rotary_factor`.
    """
    _refuse(config, partial_rotary)
    return {
        "num_layers": d.layers,
        **shape_flags(config, d),
        "swiglu": True,
        "norm_epsilon": number(config, "rms_norm_eps", 1e-6),
        "position_embedding_type": "rope",
        "rotary_base": rotary_base(config),
    }


def shape_flags(config: Config, d: Dimensions) -> dict[str, object]:
    """Megatron's flags for embedding, attention and MLP, without their number, the activation and the positions."""
    if config.get("quantization_config"):
        raise ValueError("quantization_config: the weights are quantized; start from the unquantized model")
    if not config.get("is_causal", True):  # null too
        raise ValueError(
            f"is_causal: {json.dumps(config['is_causal'])}: the model reads later tokens, as encoders do, and is not "
            "one that writes"
        )
    if config.get("per_layer_config"):
        raise ValueError("per_layer_config: layers with other settings than the rest are not converted")
    return {
        "hidden_size": d.hidden,
        "ffn_hidden_size": d.ffn,
        "num_attention_heads": d.heads,
        "group_query_attention": True,
        "num_query_groups": d.groups,
        "kv_channels": d.head_dim,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "max_position_embeddings": size(config, "max_position_embeddings"),
        "vocab_size": d.vocab,
        "make_vocab_size_divisible_by": 128,
        "untie_embeddings_and_output_weights": not is_tied(config),
        "attention_dropout": float(number(config, "attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "init_method_std": number(config, "initializer_range", 0.02),
    }


_OF_OTHER_FAMILIES: dict[str, object] = {
    "alibi": False,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rotary_pct": 1,
    "routed_scaling_factor": 1,
    "router_jitter_noise": 0,
    "scale_depth": None,
    "scale_emb": 1,
    "scoring_func": "softmax",
    "use_bidirectional_attention": False,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "use_parallel_residual": False,
}
"""Keys by which other families compute something else that no weight shows, and the values without effect."""
_SCALED_ROPE = (
    *("attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor"),
    *("mscale", "mscale_all_dim", "short_factor"),
)
"""Keys of scaled rotary frequencies, which the type `default` does not have."""


def _refuse(config: Config, partial_rotary: bool) -> None:
    for key, neutral in _OF_OTHER_FAMILIES.items():
        if (value := config.get(key)) not in (None, False, neutral):
            raise ValueError(
                f"config.json: {key} is {shown(value)}, which models of this family do not compute: correct "
                "architectures and model_type, or remove it"
            )
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"config.json: layer_types is {shown(kinds)}; it has to be a list")
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(
            f"layer_types: {shown(other[0])}: layers with a sliding window or of other kinds are not converted"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"hidden_act: {cut(str(activation))}: Megatron's --swiglu is SiLU-gated; others are not converted"
        )
    part = rotary_share(config)
    if part != 1.0 and not partial_rotary:
        raise ValueError(
            f"partial_rotary_factor: {shown(part)}: not converted for this family, whose heads rotate whole"
        )


def rotary_share(config: Config, default: float = 1.0) -> float:
    """The share of each head that rotary embedding applies to; default: where config.json does not say."""
    part = {**config, **rope_parameters(config)}.get("partial_rotary_factor")
    if part is None:
        return default
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
        raise ValueError(f"partial_rotary_factor: {shown(part)}: it has to be a number above 0, at most 1")
    return float(part)


def has_qkv_bias(config: Config) -> bool:
    """For families whose `attention_bias` adds a bias to q, k and v, and does so by default."""
    return config.get("attention_bias") is None or is_true(config, "attention_bias")


def refuse_attention_bias(config: Config) -> None:
    """For families whose `attention_bias` adds a bias to all four projections."""
    if is_true(config, "attention_bias"):
        raise ValueError("attention_bias: true: Megatron has a bias on q, k, v (--add-qkv-bias), not on o_proj alone")


def refuse_sliding_layers(config: Config) -> None:
    """For families in which `use_sliding_window` adds a window to some of the layers."""
    if is_true(config, "use_sliding_window"):
        raise ValueError("use_sliding_window: true: layers with a sliding window are not converted")


def refuse_window(config: Config) -> None:
    """For families without a window: transformers' cache would apply one, so only while it generates."""
    if number(config, "sliding_window", LARGEST) < size(config, "max_position_embeddings"):
        raise ValueError(
            f"sliding_window: {config['sliding_window']}: layers of this family have none, and transformers would use "
            "it in generation alone: remove it"
        )


def rope_parameters(config: Config) -> Config:
    """RoPE settings: transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`."""
    scaling, parameters = mapping(config, "rope_scaling"), mapping(config, "rope_parameters")
    if parameters and any(parameters.get(key) != value for key, value in scaling.items()):
        raise ValueError(
            "config.json: rope_scaling and rope_parameters differ, and transformers 5 reads rope_scaling alone: write "
            "all of it in one of them, rope_theta too"
        )
    if nested := [key for key, value in {**scaling, **parameters}.items() if isinstance(value, dict)]:
        raise ValueError(f"rope_parameters: {cut(nested[0])}: separate frequencies by kind of layer are not converted")
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**theta, **scaling, **parameters}


def rope_type(config: Config, known: Sequence[str] = ("default",)) -> str:
    """The type of the rotary frequencies. Raises ValueError if it is not in `known`."""
    rope = rope_parameters(config)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in known:
        raise ValueError(
            f"rope_scaling: {cut(kind)}: for this family only frequencies of type {' and '.join(known)} are converted"
        )
    if kind == "default" and (scaled := [key for key in _SCALED_ROPE if rope.get(key) not in (None, 1)]):
        raise ValueError(
            f"rope_scaling: {scaled[0]} is {shown(rope[scaled[0]])} without a rope_type, and transformers does not "
            "scale: name the type, or remove it"
        )
    return kind


def rotary_base(config: Config) -> int:
    theta = float(number(rope_parameters(config), "rope_theta", 10000.0))
    if not theta.is_integer() or not theta:
        raise ValueError(f"rope_theta: {theta}: Megatron's --rotary-base is a whole number, at least 1")
    return int(theta)
