"""What SFR adds to a training step (`python -m tools.bench_overhead`): steps of cross-entropy, of SFR, and of SFR with
its gradients measured, taken in turn in one process, forward, backward and Adam. Prints the median ratio, its spread,
and the ratio that the floating-point operations of matrix products predict.

Synthetic tokens and targets, one rank; on CUDA where there is one. B samples, S positions, A anchors, D dimension.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_sfr.assembly import model_config
from megatron_sfr.config import parse, read_settings
from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.cross_entropy import CrossEntropy
from megatron_sfr.objectives.gate import GateOptions
from megatron_sfr.objectives.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr import SFROptions
from megatron_sfr.objectives.targets import TargetOptions
from megatron_sfr.runtime import backend
from megatron_sfr.training.flow_term import FlowTerm, TermOptions
from megatron_sfr.training.step import ForwardStep


@dataclass
class Arm:
    """One kind of step: its name, a function that takes one, and what was found."""

    name: str
    take: Callable[[], None]
    flops: int = 0
    operations: int = 0


class Operations(TorchDispatchMode):
    """Counts what is dispatched: on a GPU each is about one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "view" not in func.name() and "detach" not in func.name()
        return func(*args, **(kwargs or {}))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"layers": 4, "hidden": 256, "ffn": 704, "heads": 4, "vocab": 8192, "seq": 512, "batch": 4}
    head = {"dim": 384, "anchors": 16, "draws": 4, "width": 512, "depth": 1, "repetitions": 15}
    for name, default in (sizes | head).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--head", choices=("mlp", "adaln"), default="mlp")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser


def flags(sizes: argparse.Namespace) -> list[str]:
    """Megatron's flags for one rank and these sizes."""
    given = {
        "num-layers": sizes.layers,
        "hidden-size": sizes.hidden,
        "ffn-hidden-size": sizes.ffn,
        "num-attention-heads": sizes.heads,
        "seq-length": sizes.seq,
        "max-position-embeddings": sizes.seq,
        "vocab-size": sizes.vocab,
        "micro-batch-size": sizes.batch,
        "global-batch-size": sizes.batch,
        "train-iters": 10**6,
        "lr": 1e-4,
        "train-data-path": "unread",
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "local",
    }
    switches = ["swiglu", "disable-bias-linear", "no-check-for-nan-in-loss-and-grad", "no-gradient-accumulation-fusion"]
    switches += ["bf16"] if sizes.bf16 else []
    return [word for k, v in given.items() for word in (f"--{k}", str(v))] + [f"--{switch}" for switch in switches]


def make_batch(sizes: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, all supervised, with evenly spaced anchors and random targets."""
    g = torch.Generator().manual_seed(0)
    B, S, A, D = sizes.batch, sizes.seq, sizes.anchors, sizes.dim
    tokens = torch.randint(0, sizes.vocab, (B, S + 1), generator=g)
    position = torch.linspace(0, S - 1, A).long().repeat(B, 1)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(B, S),
        "position_ids": torch.arange(S).repeat(B, 1),
        "anchor_position": position,
        "anchor_place": position,
        "anchor_sample": torch.arange(B)[:, None].repeat(1, A),
        "anchor_row": torch.arange(A).repeat(B, 1),
        "anchor_horizon": torch.zeros(B, A, dtype=torch.int64),
        "anchor_weight": torch.full((B, A), S / A),
        "target": torch.nn.functional.normalize(torch.randn(B, A, D, generator=g), dim=-1).half(),
    }
    return {name: x.to(device) for name, x in batch.items()}


def make_arms(sizes: argparse.Namespace, backend_name: str) -> list[Arm]:
    """Three models of one shape with their optimizers, and a step of each."""
    args = parse(read_settings(flags(sizes)))
    training.initialize_megatron()
    head = FlowHeadOptions(sfr_head=sizes.head, sfr_head_width=sizes.width, sfr_head_depth=sizes.depth)
    options = TermOptions(SFROptions(sfr_draws=sizes.draws), TargetOptions(), GateOptions(), head)
    batch = make_batch(sizes, backend.device())

    def make(name: str, plan: FlowHeadPlan | None, measure_interval: int) -> Arm:
        config = model_config(args, backend_name)
        config.head = plan
        (model,), optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        term = FlowTerm(options) if plan else None
        forward = ForwardStep(
            sizes.vocab, "ce", CrossEntropy(), term, ScheduleOptions(sfr_measure_interval=measure_interval), False
        )

        def take() -> None:
            args.curr_iteration += 1
            model.zero_grad_buffer()
            optimizer.zero_grad()
            output, loss = forward(iter([batch]), model)
            total, tokens, _ = loss(output)
            (total / tokens).backward()
            optimizer.step()

        return Arm(name, take)

    args.curr_iteration = 0
    plan = FlowHeadPlan(head, sizes.dim)
    return [make("ce", None, 0), make("sfr", plan, 0), make("sfr, gradients measured", plan, 1)]


def main() -> None:
    sizes = build_parser().parse_args()
    os.environ.setdefault("RANK", "0")
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}
    name = backend.choose("auto")
    backend.start(name)
    arms = make_arms(sizes, name)
    for arm in arms:
        for _ in range(2):
            arm.take()
        with FlopCounterMode(display=False) as flops:
            arm.take()
        with Operations() as operations:
            arm.take()
        arm.flops, arm.operations = flops.get_total_flops(), operations.count
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(sizes.repetitions):
        for arm in arms:
            torch.cuda.synchronize()  # on CPU the seam makes it nothing
            start = time.perf_counter()
            arm.take()
            torch.cuda.synchronize()
            seconds[arm.name].append(time.perf_counter() - start)
    report(sizes, name, arms, seconds)


def report(sizes: argparse.Namespace, backend_name: str, arms: list[Arm], seconds: dict[str, list[float]]) -> None:
    """A table, and the same as JSON."""
    where = torch.cuda.get_device_name() if backend_name == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}")
    print(", ".join(f"{k} {v}" for k, v in vars(sizes).items() if k != "json"))
    base = arms[0]
    rows: list[dict[str, Any]] = []
    for arm in arms:
        ratios = sorted(a / b for a, b in zip(seconds[arm.name], seconds[base.name], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "step": arm.name,
                "ms": 1e3 * statistics.median(seconds[arm.name]),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
                "predicted_by_flops": arm.flops / base.flops,
                "operations": arm.operations,
            }
        )
    print(f"{'step':26}{'ms':>9}{'ratio':>8}{'quartiles':>18}{'by FLOPs':>10}{'operations':>12}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['step']:26}{row['ms']:9.2f}{row['ratio']:8.3f}{f'{low:.3f} to {high:.3f}':>18}"
            f"{row['predicted_by_flops']:10.4f}{row['operations']:12}"
        )
    if sizes.json:
        sizes.json.write_text(
            json.dumps({"device": where, "sizes": vars(sizes) | {"json": None}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
