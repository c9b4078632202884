"""Measures what SFR adds to a training step (`python -m tools.bench_overhead`).

Interleaves steps of cross-entropy, of SFR, and of SFR with its gradients measured, each with forward, backward, Adam.
Prints time, tokens/s, TFLOP/s and MFU of the model without the head, peak memory, and the ratio to cross-entropy with
its quartiles.

Synthetic tokens and targets, one rank, on CUDA if there is a GPU. `--like qwen3-8b --layers 4` uses real shapes.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sfr.runtime import backend
from megatron_sfr.runtime.devices import BF16, FP8, peak
from megatron_sfr.runtime.replacements import replaced
from tools.model_shapes import SHAPES, Shape

if TYPE_CHECKING:
    from tools.training_steps import Arm

IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # of the shapes
"""Products that torch's counter misses: the chunked LM head adds its weight's gradient to a buffer in place."""
SMALL = Shape(layers=4, hidden=256, ffn=704, heads=4, groups=4, kv_channels=64, vocab=8192, seq=512)
HEAD = {"dim": 384, "anchors": 16, "draws": 4, "width": 512, "depth": 1}
LIKE_HEAD = {"dim": 1024, "anchors": 128, "draws": 4, "width": 1024, "depth": 1}  # bge-large's targets


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", choices=SHAPES, help="shape of a published model, its layers cut")
    for name in asdict(SMALL):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in HEAD:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--batch", type=int, help="sequences a step (4; 1 with --like)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--head", choices=("mlp", "adaln"), default="mlp")
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--fp8", choices=("delayed", "tensorwise", "blockwise"), help="recipe; implies --bf16")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser


def read_sizes(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The arguments, with sizes from --like or from the small default. parser: build_parser's, with further flags."""
    parser = parser or build_parser()
    sizes = parser.parse_args(argv)
    defaults = asdict(SHAPES[sizes.like] if sizes.like else SMALL) | (LIKE_HEAD if sizes.like else HEAD)
    for name, value in (defaults | {"batch": 1 if sizes.like else 4}).items():
        if getattr(sizes, name) is None:
            setattr(sizes, name, value)
    if sizes.fp8 and sizes.transformer_impl == "local":
        parser.error("--fp8 needs --transformer-impl transformer_engine")
    sizes.bf16 = sizes.bf16 or sizes.fp8 is not None
    return sizes


def shape_of(sizes: argparse.Namespace) -> Shape:
    return Shape(**{name: getattr(sizes, name) for name in asdict(SMALL)})


def main() -> None:
    sizes = read_sizes()
    os.environ.setdefault("RANK", "0")
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}
    backend.prepare([])
    name = backend.choose("auto")
    backend.start(name)
    from megatron_sfr.training.head_optimizer import HeadOptimizerOptions, replacements
    from tools.training_steps import make_arms

    with replaced(replacements(HeadOptimizerOptions())):
        arms = make_arms(sizes, name)
        for arm in arms:
            count(arm)
        seconds = take_turns(arms, sizes.repetitions, on_gpu=name == "cuda")
    report(sizes, torch.cuda.get_device_name() if name == "cuda" else None, arms, seconds)


def take_turns(arms: "list[Arm]", repetitions: int, *, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds of each kind of step, interleaved A B C A B C; on a GPU also the peak memory of each kind."""
    from tools.training_steps import allocated

    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(repetitions):
        for arm in arms:
            before = allocated()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()  # does nothing on the CPU backend
            start = time.perf_counter()
            arm.take()
            torch.cuda.synchronize()
            seconds[arm.name].append(time.perf_counter() - start)
            if on_gpu:
                arm.peak_bytes = max(arm.peak_bytes, arm.static_bytes + torch.cuda.max_memory_allocated() - before)
    return seconds


def count(arm: "Arm") -> None:
    """Warms up one kind of step, and counts its operations and matrix products, except Transformer Engine's."""
    from tools.training_steps import Operations, allocated

    before = allocated()
    for _ in range(2):
        arm.take()
    arm.static_bytes += max(0, allocated() - before)  # the optimizer's state comes with the first step
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops:
        arm.take()
    with Operations() as operations:
        arm.take()
    arm.flops, arm.operations = flops.get_total_flops(), operations.count


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], statistics.median(ordered), ordered[-1 - quarter]


def ratios(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of neighbouring steps: each step's time over that of the base beside it."""
    return quartiles([a / b for a, b in zip(seconds, base, strict=True)])


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def row(
    sizes: argparse.Namespace, device: str | None, base: "Arm", arm: "Arm", seconds: dict[str, list[float]]
) -> dict:
    """The numbers of one kind of step. Operations exclude the head's, so that its cost appears as a lower rate."""
    tokens, median = sizes.batch * sizes.seq, statistics.median(seconds[arm.name])
    operations = tokens * shape_of(sizes).flops()
    highest = peak(device, FP8 if sizes.fp8 else BF16) if device and sizes.bf16 else None
    rate = operations / median / 1e12
    low, ratio, high = ratios(seconds[arm.name], seconds[base.name])
    return {
        "step": arm.name,
        "ms": 1e3 * median,
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "tokens_per_second": tokens / median,
        "tflops_per_second": rate,
        "mfu": rate / highest if highest else None,
        "peak_gib": arm.peak_bytes / 2**30 if device else None,
        # Both counts miss the same kernels of Transformer Engine, so their difference is the head's.
        "predicted_by_flops": 1 + (arm.flops - base.flops) / operations,
        "counted_flops": arm.flops,
        "operations": arm.operations,
    }


def report(sizes: argparse.Namespace, device: str | None, arms: "list[Arm]", seconds: dict[str, list[float]]) -> None:
    """A table, and the same as JSON."""
    where = device or f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}")
    told = {k: v for k, v in vars(sizes).items() if k != "json"}
    print(", ".join(f"{k} {v}" for k, v in told.items()))
    rows: list[dict[str, Any]] = [row(sizes, device, arms[0], arm, seconds) for arm in arms]
    print(
        f"{'step':26}{'ms':>9}{'ratio':>8}{'quartiles':>18}{'by FLOPs':>10}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}"
        f"{'GiB':>7}{'operations':>12}"
    )
    for r in rows:
        low, high = r["ratio_quartiles"]
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        memory = "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        print(
            f"{r['step']:26}{r['ms']:9.2f}{r['ratio']:8.3f}{f'{low:.3f} to {high:.3f}':>18}"
            f"{r['predicted_by_flops']:10.4f}{r['tokens_per_second']:10.0f}{r['tflops_per_second']:9.3f}{mfu:>7}"
            f"{memory:>7}{r['operations']:12}"
        )
    if sizes.json:
        sizes.json.write_text(json.dumps({"device": where, "sizes": told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
