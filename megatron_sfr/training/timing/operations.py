"""Floating-point operations of a training step, of the backbone by Megatron's count and of the flow head by torch's.

One count for the log, the plan of a run and its hours: products of matrices, forward and backward. Recomputation, the
optimizer and element-wise operations count nothing.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.velocity import VELOCITIES


def backbone_operations(
    args: argparse.Namespace, sequences: int, lengths_squared: float | None = None, tokens: float | None = None
) -> float:
    """Operations of the model without the flow head for one global batch.

    Megatron's count, which takes every position to reach the LM head, with two corrections. With LoRA no gradient of a
    frozen weight is computed: a third of the products with weights is left out. A denoiser of KL-flow attends in both
    directions, and multiplies points of the simplex by the embedding.

    Args:
        args: Megatron's arguments and ours.
        sequences: sequences of the batch.
        lengths_squared: sum of the squared lengths of packed texts; None: sequences x seq_length^2.
        tokens: tokens without padding; None: sequences x seq_length.
    """
    from megatron.training.training import num_floating_point_operations as count  # imports the training loop

    total = count(args, sequences, lengths_squared, tokens)
    linear = count(args, sequences, 0.0, tokens)
    if args.lora_rank is not None:
        total -= linear / 3
    if args.training_task == "kl-flow":
        positions = sequences * args.seq_length if tokens is None else tokens
        total += total - linear + 4 * positions * args.hidden_size * args.padded_vocab_size
    return total


def head_operations(
    options: FlowHeadOptions, hidden_size: int, dim: int, draws: int, anchors: int, horizons: int = 1
) -> int:
    """Operations of the flow head for this many anchors.

    Counted on the head itself with one anchor, on torch's meta device. A teacher adds its forward pass and the part of
    its backward pass that leads to the hidden states.

    Args:
        dim: dimension of the target embeddings.
        draws: noise draws of each anchor.
    """
    with torch.device("meta"):
        net = VELOCITIES[options.architecture](
            *(dim, hidden_size, options.width, options.depth), *(horizons, options.time_scale)
        )
        x_t, t, h = torch.empty(1, 1, draws, dim), torch.empty(1, 1, draws, 1), torch.empty(1, 1, 1, hidden_size)
        horizon_BA = torch.zeros(1, 1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x_t, t, h, horizon_BA)
    passes = 3 + 2 * (options.ema == "teacher")
    return anchors * passes * counter.get_total_flops()
