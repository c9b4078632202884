"""Options that are not supported with chunks of the LM head, with context parallelism or in FP8, each with a remedy."""

import argparse
import math
from typing import Any


def chunk_contradictions(args: argparse.Namespace) -> list[tuple[Any, str]]:
    """Options with which the chunked LM head cannot find the output layer's weight, or where its gradient goes."""
    if not args.loss_chunk_tokens or args.training_task == "kl-flow":
        return []
    reasons = {
        "reuse_grad_buf_for_mxfp8_param_ag": "keeps weights where the LM head's gradient is accumulated",
        "fp8_output_proj": "replaces the output layer by Transformer Engine's, whose gradient chunks do not compute",
        "use_megatron_fsdp": "shards the output layer's weight between its forward and backward pass",
        "use_torch_fsdp2": "shards the output layer's weight between its forward and backward pass",
    }
    return [
        (
            args.defer_embedding_wgrad_compute,
            "defer_embedding_wgrad_compute has no effect on chunks of the LM head, which compute the gradient of its "
            "weight in the forward pass and keep no logits to compute it from later: leave it out, or set "
            "loss_chunk_tokens to 0, which computes all logits at once",
        ),
        *(
            (getattr(args, name), f"{name} {reason}: set loss_chunk_tokens to 0, which computes all logits at once")
            for name, reason in reasons.items()
        ),
    ]


def context_contradictions(args: argparse.Namespace, option: str | None) -> list[tuple[Any, str]]:
    """What does not work where ranks share a sequence.

    option: the option that puts several texts into a sequence, or None.
    """
    if args.context_parallel_size == 1:
        return []
    local, what = args.transformer_impl == "local", "context_parallel_size above 1"
    sizes = {args.micro_batch_size, args.eval_micro_batch_size} - {None, 1}
    return [
        (args.training_task == "kl-flow", f"{what} is not supported with --training-task kl-flow yet: set it to 1"),
        (
            option == "dataloader_inter_document_masking" and not local,
            f"{what} with {option}: Transformer Engine divides each document into equal parts for the ranks, and "
            f"Megatron's datasets cut documents at any token and do not pad them; leave {option} out, or set "
            "context_parallel_size to 1",
        ),
        (
            option == "sfr_packing" and sizes,
            f"{option} with {what} takes one sequence at a time: set micro_batch_size and eval_micro_batch_size to 1",
        ),
        (
            not local and args.window_size is not None and {"p2p", "a2a+p2p"} & set(args.cp_comm_type),
            f"{what} with window_size: Transformer Engine has windows with cp_comm_type all_gather and a2a only, not "
            "with p2p, the default: set one of them",
        ),
    ]


def fp8_contradictions(args: argparse.Namespace) -> list[tuple[Any, str]]:
    """Numbers of positions that FP8 cannot multiply.

    The product for a weight's gradient sums over the positions of a rank: cuBLAS takes multiples of 16 of them, MXFP8
    has blocks of 32. Transformer Engine 2.20.2 itself checks, in the first step, that each rank has a multiple of 8.
    """
    if not args.fp8 or not args.seq_length or not args.micro_batch_size:
        return []
    block = 32 if args.fp8_recipe == "mxfp8" else 16
    shards, contexts = args.tensor_model_parallel_size if args.sequence_parallel else 1, args.context_parallel_size
    multiple, n = contexts * math.lcm(block, 8 * shards), args.seq_length * args.micro_batch_size
    if n % (contexts * shards):  # ranks that do not divide the sequence are refused by Megatron
        return []
    rest = "" if args.micro_batch_size == 1 else " times micro_batch_size"
    return [
        (
            n % multiple,
            f"fp8_format: seq_length{rest} is {n}, and FP8 products need a multiple of {multiple} on these ranks: set "
            "seq_length to one, and prepare the data with it",
        )
    ]
