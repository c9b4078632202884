"""Qwen3's config as Megatron's flags: what upstream's own parser takes, and what is refused with a reason."""

import pytest

from megatron_sfr.config import Parser, to_flags
from megatron_sfr.hf.families import megatron_flags
from megatron_sfr.hf.qwen3 import rotary_base
from tests.hf.models import tiny_config


def config(**changes):
    return tiny_config("Qwen3ForCausalLM").to_dict() | {"architectures": ["Qwen3ForCausalLM"]} | changes


def test_megatron_takes_the_flags_as_they_are():
    parser = Parser()
    args = parser.read(to_flags(megatron_flags(config(tie_word_embeddings=False)), parser))
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (4, 36, 44)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (6, 2, 10)
    assert (args.group_query_attention, args.qk_layernorm, args.swiglu) == (True, True, True)
    assert (args.normalization, args.layernorm_epsilon, args.add_bias_linear) == ("RMSNorm", 1e-5, False)
    assert (args.position_embedding_type, args.rotary_base, args.max_position_embeddings) == ("rope", 50000, 96)
    assert (args.vocab_size, args.untie_embeddings_and_output_weights) == (503, True)
    assert (args.attention_dropout, args.hidden_dropout, args.init_method_std) == (0.0, 0.0, 0.2)
    assert not args.add_qkv_bias


def test_tied_embeddings_are_said():
    assert megatron_flags(config(tie_word_embeddings=True))["untie_embeddings_and_output_weights"] is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        {"rope_theta": 1000000, "rope_scaling": None},
    ],
)
def test_rotary_base_is_read_from_new_and_old_configs(rope):
    assert rotary_base(rope) == 1000000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_scaling: yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: linear"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_scaling",
        ),
        ({"rope_parameters": {"rope_theta": 1000.5}}, "rope_theta: 1000.5: Megatron's --rotary-base is a whole number"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
    ],
)
def test_what_megatron_computes_otherwise_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        megatron_flags(config(**changes))
