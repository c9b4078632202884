"""Plan a run before it starts: memory of each pipeline stage, operations, hours, disk, and layouts that fit.

Needs no GPU and no data. Weights, gradients and optimizer state are exact; activations are estimated. Further flags are
Megatron's and take precedence over the recipe.
"""

import argparse
import json
import logging
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sfr.cli.training.plan_table import memory_table, sweep_table, work_lines
from megatron_sfr.config.recipe import check_recipes

if TYPE_CHECKING:
    from megatron_sfr.planning.memory import HeadSizes

GPUS = ("a100", "h100", "h200", "b200")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file of Megatron's option names and ours")
    parser.add_argument("--recipe", dest="recipes", type=Path, action="append", default=[], help="further recipe")
    parser.add_argument("--nodes", type=int, help="machines (default: as few as hold one replica)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a machine (default 8)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind of GPU (default h100; SXM modules)")
    parser.add_argument("--memory-gib", type=float, help="memory of a GPU (default: that of its kind)")
    parser.add_argument("--mfu", type=float, help="share of the GPU's peak to assume (default 0.35; 0.20 with FP8)")
    parser.add_argument("--anchors", type=float, help="anchors of a sequence (default: from the data)")
    parser.add_argument("--target-dim", type=int, help="dimension of the targets (default: from the target store)")
    parser.add_argument("--encoder-rate", type=float, help="segments per second that `embed` was seen to encode")
    parser.add_argument("--sweep", action="store_true", help="rank the layouts of as many GPUs that fit")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(passes_flags_on=True)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. args.flags holds the flags for Megatron. The exit code is 1 if the run does not fit."""
    for name in ("nodes", "gpus", "memory_gib", "mfu", "anchors", "target_dim", "encoder_rate"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    check_recipes([args.recipe, *args.recipes], args.flags)  # before Megatron is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns of packages that are absent here, not on the cluster
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        found = make_plan(args)
    if args.json:
        print(json.dumps(found, indent=1, default=str))
    else:
        print("\n".join([*memory_table(found), *work_lines(found), *(sweep_table(found) if args.sweep else [])]))
    return 0 if found["fits"] else 1


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as one JSON object."""
    from megatron_sfr.runtime import backend

    backend.prepare(["--sfr-backend", "cpu"])
    from megatron_sfr.config.cluster_args import cluster_args, merged_flags
    from megatron_sfr.planning.layout import layout_of
    from megatron_sfr.planning.layouts import remedies, sweep
    from megatron_sfr.planning.memory import PARTS, RESERVED, plan_memory, usable
    from megatron_sfr.planning.run_data import read_run_data
    from megatron_sfr.planning.work import MFU, plan_work
    from megatron_sfr.runtime.devices import BF16, FP8, KNOWN_GPUS

    options, merged, steps = merged_flags([args.recipe, *args.recipes], args.flags)
    nodes = args.nodes or _least_nodes(options, args.gpus)
    megatron = cluster_args(merged, nodes * args.gpus)
    gpu, precision = KNOWN_GPUS[args.gpu], FP8 if megatron.fp8 else BF16
    memory = int(args.memory_gib * 2**30) if args.memory_gib else gpu.memory
    data = read_run_data(megatron, args.anchors, args.target_dim)
    layout, head = layout_of(megatron), _head(megatron, data)
    plan = plan_memory(megatron, layout, head)
    mfu = args.mfu or MFU[precision]
    found: dict[str, Any] = {
        "recipe": str(args.recipe),
        "nodes": nodes,
        "gpu": args.gpu,
        "gpu_bytes": memory,
        "usable_bytes": usable(memory),
        "reserved_share": RESERVED,
        "precision": precision,
        "layout": asdict(layout) | {"data": layout.data, "text": str(layout)},
        "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "parts": PARTS,
        "fits": plan.fits(memory),
        "remedies": [] if plan.fits(memory) else remedies(megatron, layout, head, memory),
        "assumed": [*data.assumed, *([] if args.mfu else [f"MFU {mfu:.0%} (--mfu)"])],
    }
    work = plan_work(
        *(megatron, layout, head, data),
        peak=gpu.peaks.get(precision),
        mfu=mfu,
        encoder_rate=args.encoder_rate,
        steps=steps,
    )
    found["work"] = asdict(work)
    if args.sweep:
        found["sweep"] = [
            {"layout": str(each.memory.layout), "bytes": each.memory.largest.total, "time": each.time}
            for each in sweep(megatron, layout, head, memory, args.gpus)
        ]
    return found


def _least_nodes(options: argparse.Namespace, gpus: int) -> int:
    """The fewest machines that hold one replica of the model, its experts included."""
    tensor = options.tensor_model_parallel_size
    experts = options.expert_model_parallel_size * (options.expert_tensor_parallel_size or tensor)
    ranks = options.pipeline_model_parallel_size * math.lcm(tensor * options.context_parallel_size, experts)
    return math.ceil(ranks / gpus)


def _head(args: argparse.Namespace, data: Any) -> "HeadSizes | None":
    """The flow head of a run; None without SFR, and for a loss that has no network."""
    from megatron_sfr.config.option_flags import options
    from megatron_sfr.model.flow_head import FlowHeadOptions
    from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
    from megatron_sfr.planning.memory import HeadSizes

    sfr = options(SFROptions, args)
    if not args.sfr or sfr.loss == "cka":
        return None
    return HeadSizes(options(FlowHeadOptions, args), data.dim, sfr.draws, data.anchors, data.horizons)
