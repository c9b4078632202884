"""Memory of a GPU of each pipeline stage, and what it is made of.

Weights, gradients and optimizer state are exact up to the padding of Megatron's buffers; activations are estimated
(activations.py).
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.model.velocity import VELOCITIES
from megatron_sfr.option_names import from_arguments
from megatron_sfr.planning import parameters
from megatron_sfr.planning.activations import (
    FP32,
    element_size,
    head_activations,
    kept_layers,
    output_activations,
    working_set,
)
from megatron_sfr.planning.layout import Layout
from megatron_sfr.planning.parameters import Counts

STATES = {"adam": 2, "sgd": 1, "lion": 1}
"""Tensors of the size of the parameters that an optimizer keeps."""
FP8_COPIES = 2
"""Bytes of the FP8 copies of a weight: Transformer Engine keeps it, and its transpose for the backward pass."""
RESERVED = 0.08
"""Share of a GPU's memory that is left to the CUDA context, NCCL, workspaces of kernels and fragmentation."""


@dataclass(frozen=True)
class HeadSizes:
    """The flow head of a run."""

    options: FlowHeadOptions
    dim: int
    """Dimension of the target embeddings."""
    draws: int
    anchors: float
    """Anchors of a sequence."""
    horizons: int = 1

    def parameters(self, hidden_size: int) -> int:
        """Parameters of the velocity network."""
        with torch.device("meta"):
            net = VELOCITIES[self.options.architecture](
                *(self.dim, hidden_size, self.options.width, self.options.depth),
                *(self.horizons, self.options.time_scale),
            )
        return sum(p.numel() for p in net.parameters())


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage."""

    stage: int
    layers: int
    parameters: int
    """On the GPU, without the flow head's."""
    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int
    activations: float
    """Kept for all microbatches in flight."""
    working_set: float
    """Of the layer whose backward pass runs."""
    logits: float
    """With the loss: on the last stage."""
    flow_head: float
    """Weights, gradients, optimizer, EMA and activations of the head: on the last stage."""

    @property
    def total(self) -> float:
        """All of it."""
        parts = asdict(self)
        return sum(parts[name] for name in PARTS)


PARTS = (
    *("weights", "gradients", "optimizer", "fp8_copies"),
    *("activations", "working_set", "logits", "flow_head"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of all stages."""

    layout: Layout
    stages: tuple[StageMemory, ...]

    @property
    def largest(self) -> StageMemory:
        """The stage that needs the most."""
        return max(self.stages, key=lambda stage: stage.total)

    def fits(self, memory: int) -> bool:
        """Whether every stage fits a GPU of this memory in bytes, less what is reserved."""
        return self.largest.total <= usable(memory)


def usable(memory: int) -> float:
    """Bytes of a GPU's memory that a plan may fill."""
    return memory * (1 - RESERVED)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a trained parameter."""

    weight: int
    gradient: int
    optimizer: int


def state_bytes(args: argparse.Namespace) -> StateBytes:
    """Bytes of weight, gradient and optimizer state of a trained parameter, by a run's arguments."""
    if args.optimizer not in STATES:
        raise ValueError(f"optimizer = {args.optimizer}: `megatron-sfr plan` counts {', '.join(STATES)}")
    weight, states = element_size(args), STATES[args.optimizer]
    if args.use_precision_aware_optimizer and args.optimizer == "adam":
        moments = sum(_size(getattr(args, name)) for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
        return StateBytes(weight, _size(args.main_grads_dtype), moments + _size(args.main_params_dtype))
    reduced = weight if args.grad_reduce_in_bf16 else FP32
    return StateBytes(weight, reduced, FP32 * states + (FP32 if weight < FP32 else 0))


def _size(dtype: Any) -> int:
    """Bytes of a torch dtype, or of its name in Megatron's arguments."""
    names = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    return names[dtype] if isinstance(dtype, str) else dtype.itemsize


def plan_memory(args: argparse.Namespace, layout: Layout, head: HeadSizes | None) -> MemoryPlan:
    """The memory of a run's arguments in a layout, which may be another than that of the arguments.

    Raises:
        ValueError: the model has parts that are not counted.
    """
    parameters.check_known(args)
    kinds, stages, begin = parameters.expert_layers(args), [], 0
    for stage, layers in enumerate(layout.stage_layers):
        stages.append(_stage(args, layout, head, stage, begin, kinds[begin : begin + layers]))
        begin += layers
    return MemoryPlan(layout, tuple(stages))


def _stage(
    args: argparse.Namespace, layout: Layout, head: HeadSizes | None, stage: int, begin: int, kinds: list[bool]
) -> StageMemory:
    last = stage == layout.pipeline - 1
    lora = from_arguments(LoRAOptions, vars(args))
    base, added = stage_counts(args, layout, stage, kinds), Counts()
    if lora.rank is not None:
        added = parameters.adapters(args, lora) * len(kinds)
    trained = base if lora.rank is None else added
    state, experts = state_bytes(args), layout.expert * layout.expert_tensor
    dense, routed = trained.dense(layout.tensor), trained.expert // experts
    here = sum(counts.dense(layout.tensor) + counts.expert // experts for counts in (base, added))
    in_flight = layout.in_flight(stage, layout.microbatches(args.global_batch_size))
    outputs = output_activations(args, layout, parameters.padded_vocab(args, layout.tensor)) if last else 0.0
    return StageMemory(
        stage=stage,
        layers=len(kinds),
        parameters=here,
        weights=here * state.weight,
        gradients=(dense + routed) * state.gradient,
        optimizer=-(-dense * state.optimizer // layout.shards) - (-routed * state.optimizer // layout.expert_shards),
        fp8_copies=_fp8(args, layout, begin, kinds) if args.fp8 else 0,
        activations=in_flight * kept_layers(args, layout, kinds),
        working_set=working_set(args, layout, kinds),
        logits=outputs,
        flow_head=head_bytes(args, layout, head) if last and head is not None else 0.0,
    )


def stage_counts(args: argparse.Namespace, layout: Layout, stage: int, kinds: list[bool]) -> Counts:
    """Parameters of a stage with these layers, without adapters and flow head."""
    first, last = stage == 0, stage == layout.pipeline - 1
    total = Counts()
    for experts in kinds:
        total += parameters.layer(args, experts=experts)
    if first:
        total += parameters.embedding(args, layout.tensor)
    if last:
        total += parameters.final_norm(args)
        if args.untie_embeddings_and_output_weights or not first:  # tied stages have a copy each
            total += Counts(split=parameters.padded_vocab(args, layout.tensor) * args.hidden_size)
    return total


def _fp8(args: argparse.Namespace, layout: Layout, begin: int, kinds: list[bool]) -> int:
    """Bytes of the FP8 copies of a stage's linear layers."""
    start = args.num_layers_at_start_in_bf16 if args.first_last_layers_bf16 else 0
    end = args.num_layers - (args.num_layers_at_end_in_bf16 if args.first_last_layers_bf16 else 0)
    total = 0
    for number, experts in enumerate(kinds, start=begin):
        if start <= number < end:
            counts = parameters.matrices(args, experts=experts)
            total += counts.dense(layout.tensor) + counts.expert // (layout.expert * layout.expert_tensor)
    return FP8_COPIES * total


def head_bytes(args: argparse.Namespace, layout: Layout, head: HeadSizes) -> float:
    """Bytes of the flow head on each GPU of the last stage."""
    state, count = state_bytes(args), head.parameters(args.hidden_size)
    kept = count * (state.weight + state.gradient + (FP32 if head.options.stores_ema else 0))
    dtype = torch.bfloat16 if element_size(args) < FP32 else torch.float32
    each = head_activations(head.options, args.hidden_size, head.dim, head.draws, dtype)
    ranks = layout.tensor * layout.context if layout.sequence_parallel else layout.context
    anchors = head.anchors * layout.micro_batch / ranks
    return kept - (-count * state.optimizer // layout.shards) + anchors * each
