"""Operations of a step: Megatron's count for the backbone, with our corrections, and torch's for the flow head."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.velocity import VELOCITIES
from megatron_sfr.training.timing.operations import backbone_operations, head_operations
from tools.model_shapes import SHAPES

SHAPE = SHAPES["qwen3-8b"]


def arguments(**changes: Any) -> Namespace:
    """Megatron's arguments for that shape, as far as its count reads them."""
    sizes = {
        **{"num_layers": SHAPE.layers, "hidden_size": SHAPE.hidden, "ffn_hidden_size": SHAPE.ffn},
        **{"num_attention_heads": SHAPE.heads, "num_query_groups": SHAPE.groups, "kv_channels": SHAPE.kv_channels},
        **{"padded_vocab_size": SHAPE.vocab, "seq_length": SHAPE.seq, "group_query_attention": True, "swiglu": True},
        **dict.fromkeys(("num_experts", "mtp_num_layers", "moe_ffn_hidden_size", "moe_latent_size", "lora_rank")),
        **dict.fromkeys(("moe_shared_expert_intermediate_size", "experimental_attention_variant")),
        **dict.fromkeys(("hybrid_layer_pattern", "hybrid_override_pattern")),
        **{"multi_latent_attention": False, "attention_output_gate": False, "is_hybrid_model": False},
        "training_task": "autoregressive",
    }
    return Namespace(**sizes | changes)


def test_megatron_counts_what_the_benchmarks_count() -> None:
    assert backbone_operations(arguments(), 3) == 3 * SHAPE.seq * SHAPE.flops()


def test_packed_texts_have_shorter_attention() -> None:
    args, half = arguments(), SHAPE.seq // 2
    scores = 3 * 2 * SHAPE.layers * SHAPE.heads * SHAPE.kv_channels * SHAPE.seq**2
    assert backbone_operations(args, 1) - backbone_operations(args, 1, 2 * half**2, SHAPE.seq) == scores / 2


def test_lora_leaves_out_the_gradients_of_frozen_weights() -> None:
    """The benchmark's exact count also has the adapters, and no gradient before the first of them."""
    found = backbone_operations(arguments(lora_rank=8), 1) / SHAPE.seq
    assert found == pytest.approx(SHAPE.lora_flops(8), rel=0.03)


def test_a_denoiser_attends_in_both_directions_and_reads_points_of_the_simplex() -> None:
    more = backbone_operations(arguments(training_task="kl-flow"), 1) - backbone_operations(arguments(), 1)
    scores = SHAPE.flops(causal=False) - SHAPE.flops()
    assert more == SHAPE.seq * (scores + 4 * SHAPE.hidden * SHAPE.vocab)


@pytest.mark.parametrize("architecture", ["mlp", "adaln"])
def test_the_heads_operations_are_those_that_torch_counts(architecture: str) -> None:
    options, H, D, K, A = FlowHeadOptions(architecture=architecture, width=24, depth=2), 32, 16, 4, 3
    net = VELOCITIES[architecture](D, H, 24, 2, 1, 1.0)
    x_t, h = torch.randn(1, A, K, D, requires_grad=True), torch.randn(1, A, 1, H, requires_grad=True)
    t = torch.rand(1, A, K, 1, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net(x_t, t, h, torch.zeros(1, A, dtype=torch.int64)).sum().backward()
    assert head_operations(options, H, D, K, A) == counter.get_total_flops()
    teacher = FlowHeadOptions(architecture=architecture, width=24, depth=2, ema="teacher")
    assert head_operations(teacher, H, D, K, A) == counter.get_total_flops() * 5 // 3
