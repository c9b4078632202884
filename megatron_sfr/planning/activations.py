"""Activations of a microbatch that are kept for the backward pass, by what a layer's operations save.

An estimate by counting tensors: Transformer Engine's layers with flash attention, or Megatron's local layers, which
also keep all attention scores. Buffers of kernels are not counted. h is the hidden size.
"""

import argparse

import torch
from torch import Tensor

from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.velocity import VELOCITIES
from megatron_sfr.planning.layout import Layout
from megatron_sfr.planning.parameters import attention_sizes

FP32 = 4


def element_size(args: argparse.Namespace) -> int:
    """Bytes of an activation."""
    return 2 if args.bf16 or args.fp16 else FP32


def tokens_of(args: argparse.Namespace, layout: Layout) -> float:
    """Tokens of a microbatch on one rank, before sequence parallelism divides them."""
    return args.seq_length * layout.micro_batch / layout.context


def layer_input(args: argparse.Namespace, layout: Layout) -> float:
    """Bytes of the hidden states that enter a layer."""
    ranks = layout.tensor if layout.sequence_parallel or args.distribute_saved_activations else 1
    return tokens_of(args, layout) * args.hidden_size * element_size(args) / ranks


def layer_activations(args: argparse.Namespace, layout: Layout, *, experts: bool) -> float:
    """Bytes that a decoder layer keeps for each microbatch, without full recomputation."""
    size, h, (queries, keys) = element_size(args), args.hidden_size, attention_sizes(args)
    linear = 1 if args.fp8 else size  # the copy of a linear layer's input that its weight's gradient needs
    again = layout.recompute_modules if layout.recompute == "selective" else ()
    ranks = layout.tensor if layout.sequence_parallel else 1
    norms = 0 if "layernorm" in again else 2 * h * linear
    outside = 2 * h * size + norms  # inputs and outputs of the two norms
    heads = args.num_attention_heads
    attention = (queries + 2 * keys) * size + queries * size + FP32 * heads  # q, k, v, output, normalizers
    attention += (queries + keys) * size if args.qk_layernorm else 0
    attention += queries * linear if args.fp8 else 0
    if args.transformer_impl == "local" and "core_attn" not in again:
        attention += 2 * heads * args.seq_length / layout.context * size  # scores before and after the softmax
    inside = attention + (0 if experts or "mlp" in again else _feed_forward(args, args.ffn_hidden_size, linear, again))
    total = tokens_of(args, layout) * (outside / ranks + inside / layout.tensor)
    if experts and "moe" not in again:
        total += tokens_of(args, layout) / ranks * _experts(args, layout, linear, again)
    return total


def _feed_forward(args: argparse.Namespace, width: int, linear: int, again: tuple[str, ...]) -> int:
    """Bytes of a token: the first layer's output, and the input of the second."""
    up = (2 if args.swiglu else 1) * width * element_size(args)
    return up + (0 if "moe_act" in again else width * linear)


def _experts(args: argparse.Namespace, layout: Layout, linear: int, again: tuple[str, ...]) -> float:
    """Bytes of a token of an evenly loaded rank: inputs and outputs of its experts, and of the shared expert."""
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    routed = args.moe_router_topk * (
        args.hidden_size * (linear + element_size(args)) + _feed_forward(args, width, linear, again)
    )
    shared = args.moe_shared_expert_intermediate_size or 0
    return routed + _feed_forward(args, shared, linear, again) + FP32 * args.num_experts


def kept_layers(args: argparse.Namespace, layout: Layout, experts: list[bool]) -> float:
    """Bytes that a stage's layers keep for each microbatch."""
    full = [layer_activations(args, layout, experts=has) for has in experts]
    if layout.recompute != "full":
        return sum(full)
    if layout.recompute_method == "block":
        n = min(layout.recompute_layers, len(full))
        return n * layer_input(args, layout) + sum(full[n:])
    return -(-len(full) // layout.recompute_layers) * layer_input(args, layout)


def working_set(args: argparse.Namespace, layout: Layout, experts: list[bool]) -> float:
    """Bytes beside what is kept, during a layer's backward pass: its gradients, and the layers computed again."""
    if not experts:
        return 0.0
    largest = max(layer_activations(args, layout, experts=has) for has in experts)
    again = layout.recompute_layers if layout.recompute == "full" and layout.recompute_method == "uniform" else 1
    gathered = 2 * tokens_of(args, layout) * args.hidden_size * element_size(args) if layout.sequence_parallel else 0
    return (again + 1 if layout.recompute == "full" else 1) * largest + gathered


def output_activations(args: argparse.Namespace, layout: Layout, vocab: int) -> float:
    """Bytes of the last stage's final norm, output layer and token loss for a microbatch.

    With chunks the logits and their gradient exist for one chunk; hidden states and their gradient for all positions.
    """
    size, tokens = element_size(args), tokens_of(args, layout)
    positions = min(tokens, layout.loss_chunk) if layout.loss_chunk else tokens
    ranks = layout.tensor if layout.sequence_parallel else 1
    hidden = tokens * args.hidden_size * size * (2 / ranks + (2 if layout.loss_chunk else 0))
    return 2 * positions * vocab / layout.tensor * size + hidden


def head_activations(options: FlowHeadOptions, hidden_size: int, dim: int, draws: int, dtype: torch.dtype) -> int:
    """Bytes that the flow head keeps for one anchor: what autograd saves of its forward pass on the meta device."""
    with torch.device("meta"):
        net = VELOCITIES[options.architecture](dim, hidden_size, options.width, options.depth, 1, options.time_scale)
        net = net.to(dtype)
        sizes = ((1, 1, draws, dim), (1, 1, draws, 1), (1, 1, 1, hidden_size))
        x_t, t, h = (torch.empty(size, dtype=dtype, requires_grad=True) for size in sizes)
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=False):
        out = net(x_t, t, h, torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    assert out.shape == x_t.shape
    return sum(x.untyped_storage().nbytes() for x in saved.values())
