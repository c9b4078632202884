"""Compares a training step of LoRA with one of all weights (`python -m tools.bench_lora --rank 8`).

Prints time, tokens/s, bytes of gradients and of optimizer state and, on a GPU, the peak memory. Beside them the bounds:
matrix products calculated from the shape (torch's counter has to find as many), and bytes per trained parameter.
Synthetic tokens, one rank, random base weights. `--like qwen3-8b --layers 4` uses real shapes.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.runtime import backend
from tools.bench_overhead import build_parser, count, ratios, read_sizes, shape_of, take_turns

if TYPE_CHECKING:
    from tools.training_steps import Arm, Built

FP32 = 4
"""Bytes of a number. Gradients, and Adam's two moments, are kept in fp32; with bf16 weights also a copy of those."""


def main() -> None:
    parser = build_parser()
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (%(default)s)")
    sizes = read_sizes(parser=parser)
    os.environ.setdefault("RANK", "0")
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29578"}
    backend.prepare([])
    name = backend.choose("auto")
    backend.start(name)
    from megatron_sfr.model.lora.attach import attach_adapters
    from tools.training_steps import begin, build, make_arm, make_batch

    args = begin(sizes)
    batch, lora = make_batch(sizes, backend.device()), LoRAOptions(rank=sizes.rank, alpha=2.0 * sizes.rank)
    models = {
        "all weights": build(args, name, None),
        f"LoRA, rank {sizes.rank}": build(args, name, None, [attach_adapters(lora, args.seed)]),
    }
    arms = [make_arm(step, built, args, batch) for step, built in models.items()]
    for arm in arms:
        count(arm)
    seconds = take_turns(arms, sizes.repetitions, on_gpu=name == "cuda")
    report(sizes, name == "cuda", list(zip(arms, models.values(), strict=True)), seconds)


def gradient_bytes(model: Any) -> int:
    """Bytes of the gradient buffers of upstream's DDP."""
    buffers = [*model.buffers, *model.expert_parallel_buffers]
    return sum(x.grad_data.numel() * x.grad_data.element_size() for x in buffers)


def optimizer_bytes(built: "Built") -> int:
    """Bytes of the optimizer's moments, and of its copies of the weights."""
    model = {p.data_ptr() for p in built.model.parameters()}
    tensors = [x for x in _tensors(built.optimizer) if x.data_ptr() not in model and x.numel() > 1]
    return sum(x.numel() * x.element_size() for x in {x.data_ptr(): x for x in tensors}.values())


def _tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for p, state in part.optimizer.state.items():
            yield p
            yield from (x for x in state.values() if isinstance(x, torch.Tensor))


def row(sizes: argparse.Namespace, arm: "Arm", built: "Built", seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The numbers of one kind of step, measured and calculated."""
    shape, tokens = shape_of(sizes), sizes.batch * sizes.seq
    lora = arm.name != "all weights"
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    times = seconds[arm.name]
    flops = shape.lora_flops(sizes.rank, causal=False) if lora else shape.flops(causal=False)
    return {
        "step": arm.name,
        "ms": 1e3 * statistics.median(times),
        "ratio": ratios(times, seconds["all weights"])[1],
        "tokens_per_second": tokens / statistics.median(times),
        "trained": trained,
        "calculated_trained": shape.lora_parameters(sizes.rank) if lora else shape.parameters,
        "gradient_bytes": gradient_bytes(built.model),
        "calculated_gradient_bytes": FP32 * trained,
        "optimizer_bytes": optimizer_bytes(built),
        "calculated_optimizer_bytes": (3 if sizes.bf16 else 2) * FP32 * trained,
        "counted_flops": arm.flops,
        "calculated_flops": tokens * flops,
        "peak_gib": arm.peak_bytes / 2**30,
    }


def report(
    sizes: argparse.Namespace, on_gpu: bool, arms: "list[tuple[Arm, Built]]", seconds: dict[str, list[float]]
) -> None:
    """A table, and the same as JSON. In brackets: the bound."""
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}")
    print(", ".join(f"{k} {v}" for k, v in vars(sizes).items() if k != "json"))
    rows = [row(sizes, arm, built, seconds) for arm, built in arms]
    for r in rows:
        print(f"{r['step']}: {r['ms']:.2f} ms, {r['tokens_per_second']:.0f} tokens/s, {r['ratio']:.3f} of all weights")
        for name in ("trained", "gradient_bytes", "optimizer_bytes"):
            print(f"    {name.replace('_', ' ')}: {r[name]:,} ({r['calculated_' + name]:,})")
        print(f"    matrix products: {r['counted_flops'] / 1e9:.3f} ({r['calculated_flops'] / 1e9:.3f}) GFLOP")
        if on_gpu:
            print(f"    peak: {r['peak_gib']:.2f} GiB")
    print(f"ratio of the matrix products: {rows[1]['calculated_flops'] / rows[0]['calculated_flops']:.3f}")
    if sizes.json:
        sizes.json.write_text(json.dumps({"device": where, "sizes": vars(sizes) | {"json": ""}, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
