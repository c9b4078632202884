"""Work of a run: operations and tokens of a step, steps of an epoch, hours, and the sizes of what it writes."""

import argparse
from dataclasses import dataclass

from megatron_sfr.data.targets.vectors import row_sizes
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.option_names import from_arguments
from megatron_sfr.planning import parameters
from megatron_sfr.planning.activations import FP32
from megatron_sfr.planning.layout import Layout
from megatron_sfr.planning.memory import HeadSizes, stage_counts, state_bytes
from megatron_sfr.planning.run_data import RunData
from megatron_sfr.training.timing.operations import backbone_operations, head_operations

MFU = {"bf16": 0.35, "fp8": 0.20}
"""Assumed share of the GPU's peak in the run's precision. Nothing here has run on such a cluster."""


@dataclass(frozen=True)
class Work:
    """The work of a run. None: not known."""

    steps: int | None
    tokens_per_step: int
    operations_per_step: float
    """Of the backbone and the flow head, without recomputation."""
    head_share: float
    """The flow head's share of them."""
    recomputed: float
    """What full recomputation adds, as a share of the operations."""
    steps_per_epoch: float | None
    tokens_per_epoch: int | None
    """Positions of an epoch's sequences, padding included."""
    microbatches: int
    bubble: float
    mfu: float | None
    hours: float | None
    checkpoint_bytes: int
    store_bytes: int | None
    encoder_hours: float | None


def plan_work(
    args: argparse.Namespace,
    layout: Layout,
    head: HeadSizes | None,
    data: RunData,
    *,
    peak: float | None,
    mfu: float | None,
    encoder_rate: float | None,
    steps: int | None,
) -> Work:
    """The work of a run's parsed arguments.

    Args:
        peak: TFLOP/s of a GPU in the run's precision.
        mfu: share of it that the run reaches; the bubble is part of what is lost.
        encoder_rate: segments that are encoded in a second.
        steps: of the run.
    """
    size = args.global_batch_size
    backbone = backbone_operations(args, size)
    added = 0
    if head is not None:
        sizes = (head.options, args.hidden_size, head.dim, head.draws, round(size * head.anchors), head.horizons)
        added = head_operations(*sizes)
    hours = None
    if peak is not None and mfu is not None and steps is not None:
        hours = steps * (backbone + added) / (mfu * peak * 1e12 * layout.world) / 3600
    store = None
    if args.sfr and data.segments is not None:
        store = sum(row_sizes(data.segments, data.dim).values())
    return Work(
        steps=steps,
        tokens_per_step=size * args.seq_length,
        operations_per_step=backbone + added,
        head_share=added / (backbone + added),
        recomputed=recomputed_share(layout),
        steps_per_epoch=None if data.sequences is None else data.sequences / size,
        tokens_per_epoch=None if data.sequences is None else data.sequences * args.seq_length,
        microbatches=layout.microbatches(size),
        bubble=layout.bubble(layout.microbatches(size)),
        mfu=mfu,
        hours=hours,
        checkpoint_bytes=checkpoint_bytes(args, layout, head),
        store_bytes=store,
        encoder_hours=data.segments / encoder_rate / 3600 if data.segments and encoder_rate and args.sfr else None,
    )


def recomputed_share(layout: Layout) -> float:
    """What full recomputation adds to the operations: the layers' forward pass, a third of forward and backward."""
    if layout.recompute != "full":
        return 0.0
    layers = sum(layout.stage_layers)
    if layout.recompute_method == "block":
        return sum(min(layout.recompute_layers, n) for n in layout.stage_layers) / layers / 3
    return 1 / 3


def checkpoint_bytes(args: argparse.Namespace, layout: Layout, head: HeadSizes | None) -> int:
    """Bytes of the tensors of a torch_dist checkpoint: each parameter once, with its optimizer state."""
    state, lora = state_bytes(args), from_arguments(LoRAOptions, vars(args))
    kinds = parameters.expert_layers(args)
    trained = stage_counts(args, Layout(1, tensor=layout.tensor), 0, kinds).total
    if lora.rank is not None:
        trained = (parameters.adapters(args, lora) * len(kinds)).total
    if head is not None:
        trained += head.parameters(args.hidden_size)
    each = state.weight + (0 if args.no_save_optim else state.optimizer)
    ema = head.parameters(args.hidden_size) * FP32 if head is not None and head.options.stores_ema else 0
    return trained * each + ema
