"""Qwen3, dense: its weights as rows, and its config as Megatron's flags."""

from megatron_sfr.hf.rows import QKV, Config, Dimensions, Direct, Family, GatedMLP, Row, need

_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

ROWS: tuple[Row, ...] = (
    Direct("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), 0, padded=True),
    Direct(_M + "self_attention.linear_qkv.layer_norm_weight", (_H + "input_layernorm.weight",), ("hidden",)),
    QKV(
        _M + "self_attention.linear_qkv.weight",
        (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
        ("hidden",),
    ),
    Direct(_M + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), ("head_dim",)),
    Direct(_M + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), ("head_dim",)),
    Direct(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), ("hidden", "query"), 1),
    Direct(_M + "mlp.linear_fc1.layer_norm_weight", (_H + "post_attention_layernorm.weight",), ("hidden",)),
    GatedMLP(_M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight")),
    Direct(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), ("hidden", "ffn"), 1),
    Direct("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
)
OUTPUT = Direct("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), 0, padded=True)

EXTRA_STATES = (
    _M + "self_attention.linear_qkv",
    _M + "self_attention.linear_proj",
    _M + "self_attention.core_attention",
    _M + "self_attention.q_layernorm",
    _M + "self_attention.k_layernorm",
    _M + "mlp.linear_fc1",
    _M + "mlp.linear_fc2",
    "decoder.final_layernorm",
)


def dimensions(config: Config) -> Dimensions:
    heads = need(config, "num_attention_heads")
    return Dimensions(
        layers=need(config, "num_hidden_layers"),
        vocab=need(config, "vocab_size"),
        hidden=need(config, "hidden_size"),
        ffn=need(config, "intermediate_size"),
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or 128,  # Qwen3Config's default; it is not hidden_size / heads
    )


def rows(config: Config) -> tuple[Row, ...]:
    return ROWS if is_tied(config) else (*ROWS, OUTPUT)


def is_tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def flags(config: Config) -> dict[str, object]:
    refuse(config)
    d = dimensions(config)
    return {
        "num_layers": d.layers,
        "hidden_size": d.hidden,
        "ffn_hidden_size": d.ffn,
        "num_attention_heads": d.heads,
        "group_query_attention": True,
        "num_query_groups": d.groups,
        "kv_channels": d.head_dim,
        "qk_layernorm": True,
        "swiglu": True,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "position_embedding_type": "rope",
        "rotary_base": rotary_base(config),
        "max_position_embeddings": config.get("max_position_embeddings", 32768),
        "vocab_size": d.vocab,
        "make_vocab_size_divisible_by": 128,
        "untie_embeddings_and_output_weights": not is_tied(config),
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "init_method_std": config.get("initializer_range", 0.02),
    }


def refuse(config: Config) -> None:
    """ValueError for what Megatron would compute otherwise than transformers, with the reason."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act: {activation}: Megatron's --swiglu is SiLU-gated; no other gate is converted")
    if config.get("attention_bias", False):
        raise ValueError("attention_bias: true: Megatron has a bias on q, k, v (--add-qkv-bias), not on o_proj alone")
    if config.get("use_sliding_window", False) or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("use_sliding_window: true: layers with a sliding window are not converted")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: the weights are quantised; start from the unquantised model")
    rope = rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope_scaling: {kind}: Megatron scales rotary frequencies otherwise for this family")


def rope_parameters(config: Config) -> Config:
    """transformers 5 writes `rope_parameters`; before, it was `rope_theta` beside `rope_scaling`."""
    old = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rotary_base(config: Config) -> int:
    theta = float(rope_parameters(config).get("rope_theta", 10000.0))
    if not theta.is_integer():
        raise ValueError(f"rope_theta: {theta}: Megatron's --rotary-base is a whole number")
    return int(theta)


FAMILY = Family(dimensions=dimensions, rows=rows, flags=flags, extra_states=EXTRA_STATES)
