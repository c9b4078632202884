"""Other layouts of a run: the single changes that make it fit, and a search over parallel sizes."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_sfr.planning.layout import Layout
from megatron_sfr.planning.memory import HeadSizes, MemoryPlan, plan_memory
from megatron_sfr.planning.parameters import attention_sizes
from megatron_sfr.planning.work import recomputed_share


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    memory: MemoryPlan
    time: float
    """Time of a step relative to the operations alone: recomputation, and the bubble. Communication is not counted."""


def remedies(args: argparse.Namespace, layout: Layout, head: HeadSizes | None, memory: int) -> list[str]:
    """The flags of which each, alone, makes a layout fit; the cheapest first. If none does, all of them together."""
    found, together, flags = list[str](), layout, list[str]()
    for flag, change in changes(args, layout):
        if plan_memory(args, change, head).fits(memory):
            found.append(flag)
        if (change.tensor, change.pipeline) == (layout.tensor, layout.pipeline):
            differs = {name: x for name, x in vars(change).items() if x != getattr(layout, name)}
            together, flags = replace(together, **differs), [*flags, flag]
    if not found and len(flags) > 1 and plan_memory(args, together, head).fits(memory):
        return [" ".join(flags)]
    return found


def changes(args: argparse.Namespace, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Flags that lower the memory of a layout, with the layout that results; the cheapest in time first."""
    if not layout.distributed_optimizer and layout.data * layout.context > 1:
        yield "--use-distributed-optimizer", replace(layout, distributed_optimizer=True)
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield "--sequence-parallel", replace(layout, sequence_parallel=True)
    if not layout.loss_chunk:
        yield "--loss-chunk-tokens 4096", replace(layout, loss_chunk=4096)
    if layout.micro_batch > 1:
        yield "--micro-batch-size 1", replace(layout, micro_batch=1)
    if layout.recompute != "full":
        change = replace(layout, recompute="full", recompute_method="uniform", recompute_layers=1)
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", change
    for tensor, pipeline in ((2, 1), (1, 2), (2, 2), (4, 1), (4, 2)):
        wider = resized(args, layout, layout.tensor * tensor, layout.pipeline * pipeline)
        if wider is not None:
            sizes = [f"--tensor-model-parallel-size {wider.tensor} --sequence-parallel"] if tensor > 1 else []
            sizes += [f"--pipeline-model-parallel-size {wider.pipeline}"] if pipeline > 1 else []
            yield " ".join(sizes), wider


def resized(args: argparse.Namespace, layout: Layout, tensor: int, pipeline: int, most: int = 8) -> Layout | None:
    """The layout with other tensor and pipeline parallel sizes; None where Megatron would refuse them.

    Args:
        most: GPUs of a node, inside which tensor parallelism stays.
    """
    keys = attention_sizes(args)[1]
    ranks = tensor * pipeline * layout.context
    divided = (args.num_attention_heads, keys // args.kv_channels, args.ffn_hidden_size)
    if tensor > most or layout.world % ranks or any(size % tensor for size in divided):
        return None
    if pipeline != layout.pipeline and args.num_layers % pipeline:
        return None
    layers = layout.stage_layers if pipeline == layout.pipeline else (args.num_layers // pipeline,) * pipeline
    change = replace(
        layout,
        tensor=tensor,
        pipeline=pipeline,
        chunks=layout.chunks if pipeline == layout.pipeline else 1,
        sequence_parallel=tensor > 1,
        expert_tensor=tensor if layout.expert_tensor == layout.tensor else layout.expert_tensor,
        stage_layers=layers,
    )
    if change.world % (change.expert * change.expert_tensor * pipeline):
        return None
    return None if args.global_batch_size % (change.micro_batch * change.data) else change


def sweep(args: argparse.Namespace, layout: Layout, head: HeadSizes | None, memory: int, most: int) -> list[Candidate]:
    """The layouts of as many GPUs that fit, the fastest first: by recomputation and bubble, then by TP and PP."""
    found = []
    common = replace(layout, recompute_method="uniform", recompute_layers=1, distributed_optimizer=True)
    sizes = product((1, 2, 4, 8), range(1, layout.world + 1), (1, 2, 4), ("none", "full"))
    for tensor, pipeline, micro_batch, recompute in sizes:
        start = replace(common, micro_batch=micro_batch, recompute=recompute)
        change = resized(args, start, tensor, pipeline, most)
        if change is None or (microbatches := change.microbatches(args.global_batch_size)) < pipeline:
            continue
        plan = plan_memory(args, change, head)
        if plan.fits(memory):
            found.append(Candidate(plan, (1 + recomputed_share(change)) / (1 - change.bubble(microbatches))))
    return sorted(found, key=lambda each: (round(each.time, 3), each.memory.layout.tensor, each.memory.layout.pipeline))
