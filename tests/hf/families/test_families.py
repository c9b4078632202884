"""Each family's config as Megatron's flags: what upstream's own parser takes, and what is refused with a reason."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sfr.config.settings import Parser, to_flags
from megatron_sfr.hf.families.dense import rotary_base
from megatron_sfr.hf.families.family_registry import FAMILIES, megatron_flags
from megatron_sfr.hf.families.llama import FIXED
from tests.hf.models import LLAMA3, NEMOTRON_H, tiny_config

LLAMA, MISTRAL, QWEN2, QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
MOE = "Qwen3MoeForCausalLM"
EQUAL_LAYERS = sorted(FAMILIES.keys() - {NEMOTRON_H})  # test_nemotron_h.py has the other
GLM, PHI3, SEED, SMOLLM3 = "GlmForCausalLM", "Phi3ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"


NEEDED = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "layers_block_type", "moe_intermediate_size", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "n_routed_experts", "moe_shared_expert_intermediate_size"),
    "shared_expert_intermediate_size",
}
"""Keys that may be refused where they are missing."""


def config(architecture=QWEN3, **changes):
    return tiny_config(architecture).to_dict() | {"architectures": [architecture]} | changes


def parsed(architecture, **changes):
    """The flags as upstream's parser reads them."""
    parser = Parser()
    return parser.read(to_flags(megatron_flags(config(architecture, **changes)), parser))


@pytest.mark.parametrize(
    ("architecture", "head_dim", "qk_norm", "qkv_bias"),
    [(LLAMA, 10, False, False), (MISTRAL, 10, False, False), (QWEN2, 6, False, True), (QWEN3, 10, True, False)],
)
def test_megatron_takes_the_flags_as_they_are(architecture, head_dim, qk_norm, qkv_bias):
    args = parsed(architecture, tie_word_embeddings=False)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (4, 36, 44)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (6, 2, head_dim)
    assert (args.group_query_attention, args.qk_layernorm, args.swiglu) == (True, qk_norm, True)
    assert (args.normalization, args.layernorm_epsilon, args.add_bias_linear) == ("RMSNorm", 1e-5, False)
    assert (args.position_embedding_type, args.rotary_base, args.max_position_embeddings) == ("rope", 50000, 96)
    assert (args.vocab_size, args.untie_embeddings_and_output_weights) == (503, True)
    assert (args.attention_dropout, args.hidden_dropout, args.init_method_std) == (0.0, 0.0, 0.2)
    assert (args.add_qkv_bias, args.use_rope_scaling, args.window_size) == (qkv_bias, False, None)


@pytest.mark.parametrize("architecture", EQUAL_LAYERS)
def test_tied_embeddings_are_said(architecture):
    said = megatron_flags(config(architecture, tie_word_embeddings=True))
    assert said["untie_embeddings_and_output_weights"] is False


@pytest.mark.parametrize(
    ("architecture", "head_dim"), [(LLAMA, 36 // 6), (MISTRAL, 36 // 6), (QWEN2, 36 // 6), (QWEN3, 128)]
)
def test_a_head_that_the_config_does_not_name(architecture, head_dim):
    assert megatron_flags(config(architecture, head_dim=None))["kv_channels"] == head_dim


def flags_unless_refused(config):
    try:
        return megatron_flags(config)
    except ValueError:
        return None


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_a_key_that_config_json_leaves_out_means_what_transformers_takes(architecture):
    """For each key: the same flags as with transformers' default of the class, or a refusal."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64}  # any default of groups fits
    full = tiny_config(architecture, **sizes).to_dict() | {"architectures": [architecture]}
    for key in full.keys() - {"architectures", "model_type"}:
        short = {name: value for name, value in full.items() if name != key}
        flags = flags_unless_refused(short)
        assert flags is not None or key in NEEDED
        if flags is not None:
            completed = AutoConfig.for_model(**deepcopy(short)).to_dict()
            assert flags == megatron_flags(completed | {"architectures": [architecture]}), key


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        {"rope_theta": 1000000, "rope_scaling": None},
    ],
)
def test_rotary_base_is_read_from_new_and_old_configs(rope):
    assert rotary_base(rope) == 1000000


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("base", "head_dim"), [(500000.0, 128), (500000.0, 64), (50000.0, 10)])
def test_llama3_frequencies_are_upstreams_bit_for_bit(base, head_dim, factor):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rope = LLAMA3 | {"rope_theta": base, "factor": factor}
    args = parsed(LLAMA, rope_parameters=rope, head_dim=head_dim)
    upstream = RotaryEmbedding(
        args.kv_channels,
        args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        use_cpu_initialization=True,
    ).inv_freq
    wanted, scale = ROPE_INIT_FUNCTIONS["llama3"](tiny_config(LLAMA, rope_parameters=rope, head_dim=head_dim))
    assert torch.equal(upstream, wanted)
    assert scale == 1.0
    divided = 1 / base ** (torch.arange(0, head_dim, 2) / head_dim) / wanted
    for kind in (divided < 1.001, (divided > 1.1) & (divided < 0.9 * factor), divided > 0.999 * factor):
        assert kind.any()  # left, blended and divided ones are among them


def test_llama3_is_read_from_old_configs():
    rope = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    said = megatron_flags(config(LLAMA, rope_parameters=None, rope_theta=500000.0, rope_scaling=rope))
    assert (said["use_rope_scaling"], said["rope_scaling_factor"], said["rotary_base"]) == (True, 32.0, 500000)


@pytest.mark.parametrize("window", [1, 17, 4096])
def test_a_window_counts_the_token_itself_in_transformers_only(window):
    args = parsed(MISTRAL, sliding_window=window)
    assert args.window_size == (window - 1, 0)
    assert not args.masked_softmax_fusion


def test_a_window_that_is_not_named_is_mistrals_default():
    without = config(MISTRAL)
    del without["sliding_window"]
    assert megatron_flags(without)["window_size"] == "4095,0"


@pytest.mark.parametrize("normalized", [False, True])
def test_experts_and_their_router(normalized):
    args = parsed(MOE, norm_topk_prob=normalized)
    assert (args.num_experts, args.moe_ffn_hidden_size, args.moe_router_topk) == (6, 20, 3)
    assert args.moe_router_pre_softmax is not normalized
    older = {key: value for key, value in config(MOE).items() if key != "num_local_experts"} | {"num_experts": 5}
    assert megatron_flags(older)["num_experts"] == 5


def rope(**changes):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | changes}


@pytest.mark.parametrize("architecture", EQUAL_LAYERS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (rope(rope_type="yarn", factor=4.0), "rope_scaling: yarn: for this family only"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: linear"),
        (rope(rope_type="dynamic", factor=2.0), "rope_scaling: dynamic"),
        (rope(factor=4.0), r"rope_scaling: factor is 4\.0 without a rope_type"),
        (rope() | {"rope_theta": 1e6}, r"rope_theta is 1000000\.0, and 10000\.0 in rope_parameters"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0, which models of this family do not"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier is 12\.0"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2', but architectures names"),
        (rope(rope_theta=1000.5), r"rope_theta: 1000\.5: Megatron's --rotary-base is a whole number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling and rope_parameters differ"),
        ({"rope_parameters": {"full_attention": rope()["rope_parameters"]}}, "rope_parameters: full_attention: sep"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"is_causal": False}, "is_causal: false"),
        ({"is_causal": None}, "is_causal: null"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "per_layer_config: layers with other settings"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"max_position_embeddings": None}, "config.json has no 'max_position_embeddings'"),
    ],
)
def test_what_megatron_computes_otherwise_is_refused(architecture, changes, reason):
    with pytest.raises(ValueError, match=reason):
        megatron_flags(config(architecture, **changes))


@pytest.mark.parametrize("architecture", EQUAL_LAYERS)
def test_keys_of_other_families_without_effect_are_accepted(architecture):
    neutral = {"logit_scale": 1.0, "clip_qkv": None, "alibi": False, "router_jitter_noise": 0.0, "use_logn_attn": False}
    assert megatron_flags(config(architecture, **neutral)) == megatron_flags(config(architecture))


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_code_of_a_models_own_is_converted_only_where_it_is_a_copy_of_transformers(architecture):
    own = config(architecture, auto_map={"AutoModelForCausalLM": "modeling.Own", "AutoTokenizer": [None, "own.T"]})
    if architecture in (PHI3, NEMOTRON_H):
        assert megatron_flags(own)
        return
    with pytest.raises(ValueError, match=r"auto_map: the model is computed by custom code, 'modeling\.Own'"):
        megatron_flags(own)


@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - {GLM, PHI3, NEMOTRON_H}))
@pytest.mark.parametrize("changes", [rope(partial_rotary_factor=0.5), {"partial_rotary_factor": 0.5}])
def test_a_part_of_a_head_is_refused_where_the_family_turns_whole_heads(architecture, changes):
    with pytest.raises(ValueError, match=r"partial_rotary_factor: 0\.5"):
        megatron_flags(config(architecture, **changes))


@pytest.mark.parametrize(("architecture", "interleaved"), [(PHI3, False), (GLM, True)])
def test_the_turned_part_of_a_head(architecture, interleaved):
    args = parsed(architecture, **rope(partial_rotary_factor=0.25))
    assert (args.rotary_percent, args.rotary_interleaved) == (0.25, interleaved)
    for wrong in (0, 1.5, "half"):
        with pytest.raises(ValueError, match="above 0, at most 1"):
            megatron_flags(config(architecture, **rope(partial_rotary_factor=wrong)))


def test_the_part_that_glm_turns_where_the_config_does_not_say():
    assert parsed(GLM, **rope()).rotary_percent == 0.5


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"no_rope_layers": [1, 0, 1, 1]}, [0, 1, 0, 0]),
        ({"no_rope_layers": None}, [0, 0, 0, 1]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [0, 1, 0, 1]),
    ],
)
def test_layers_without_positions(changes, without):
    assert parsed(SMOLLM3, **changes).no_rope_freq == without


def test_an_expert_that_all_tokens_share():
    args = parsed("Qwen2MoeForCausalLM")
    assert (args.moe_shared_expert_intermediate_size, args.moe_shared_expert_gate, args.add_qkv_bias) == (
        28,
        True,
        True,
    )


@pytest.mark.parametrize("architecture", [GLM, SEED])
@pytest.mark.parametrize(("bias", "expected"), [(None, True), (True, True), (False, False)])
def test_biases_of_q_k_and_v(architecture, bias, expected):
    assert parsed(architecture, attention_bias=bias).add_qkv_bias is expected


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "a list of 4 zeros and ones"),
        (SMOLLM3, {"mlp_bias": True}, "mlp_bias"),
        (PHI3, {"resid_pdrop": 0.1}, "resid_pdrop"),
        (SEED, {"attention_out_bias": True}, "attention_out_bias"),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}, "layers without experts"),
        *((x, {"rope_parameters": LLAMA3}, "rope_scaling: llama3") for x in (MISTRAL, QWEN2, QWEN3)),
        *((x, {"use_sliding_window": True}, "use_sliding_window") for x in (QWEN2, QWEN3)),
        *((x, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window") for x in (QWEN2, QWEN3)),
        *((x, {"attention_bias": True}, "attention_bias") for x in (LLAMA, QWEN3)),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        *(
            (LLAMA, {"rope_parameters": LLAMA3 | {key: 3}}, f"llama3 with {key}: 3: .* with {value:g} only")
            for key, value in FIXED.items()
        ),
        *(
            (x, {"sliding_window": 17}, "sliding_window: 17: layers of this family have none")
            for x in (GLM, LLAMA, SEED)
        ),
        (
            LLAMA,
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 4096},
            "llama3 with original_max_position_embeddings: 4096",
        ),
        (LLAMA, {"rope_parameters": LLAMA3 | {"factor": None}}, "config.json has no 'factor'"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window: 0"),
        (MOE, {"mlp_only_layers": [1]}, "layers without experts"),
        (MOE, {"decoder_sparse_step": 2}, "layers without experts"),
        (MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok: 1: its weight is always 1"),
        (MOE, {"moe_intermediate_size": None}, "config.json has no 'moe_intermediate_size'"),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)
def test_what_a_family_has_of_its_own_is_refused(architecture, changes, reason):
    with pytest.raises(ValueError, match=reason):
        megatron_flags(config(architecture, **changes))
