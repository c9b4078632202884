"""Measures the losses over the vocabulary (`python -m tools.bench_loss`): bytes moved, peak memory, collectives, time.

Compares ours with Megatron's vocab-parallel cross-entropy, torch's, and GEM in plain torch. Forward and backward, in a
process group of one rank. T tokens, V columns.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels import plain
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token import closed_form
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.sed import SED
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from tools.bench_overhead import processor, ratios
from tools.model_shapes import SHAPES
from tools.traffic import Traffic

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOOR = 3  # reads and writes of each logit that forward and backward need at least
LEGEND = f"""\
memory: operands of at least half the logits' storage, and slices of it; the floor is {FLOOR} times an element's size.
cache: blocks that are reused immediately. A second-level cache of their size keeps this traffic from memory; without
one it goes to memory too. Both are counted from the operands of torch's operations, not measured.
peak: largest number of bytes alive beyond the logits. floats/token: what this rank passes to collectives."""


@dataclass
class Result:
    """One loss. Bytes and counts as in `Traffic`; none on CUDA, where the kernels are not torch operations."""

    name: str
    memory_bytes_per_logit: float | None = None
    cache_bytes_per_logit: float | None = None
    peak_bytes_per_logit: float | None = None
    collectives: int | None = None
    floats_per_row: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Loss = Callable[[Tensor, Tensor], Tensor]  # logits [T, V] and labels [T] -> the losses' sum


def ours(token_loss: TokenLoss) -> Loss:
    """The package's loss: kernels/plain.py on CPU; on CUDA kernels/fused.py, and also the plain version."""

    def loss(z_TV: Tensor, y_T: Tensor) -> Tensor:
        vocab = Vocab(z_TV.shape[1], group=dist.group.WORLD)
        return vocab_parallel_loss(z_TV, y_T, token_loss, vocab, overwrite=True)[0].sum()

    return loss


def megatron_cross_entropy(z_TV: Tensor, y_T: Tensor) -> Tensor:
    """Upstream's unfused loss, which runs on any device."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(z_TV[:, None], y_T[:, None], tp_group=dist.group.WORLD).sum()


def torch_cross_entropy(z_TV: Tensor, y_T: Tensor) -> Tensor:
    """torch's loss on fp32 logits, as in training."""
    return F.cross_entropy(z_TV.float(), y_T, reduction="sum")


def textbook_gem(z_TV: Tensor, y_T: Tensor) -> Tensor:
    """Linear GEM written as its definition: log-probabilities, competitors q, the product of q and the log-ratios."""
    log_p_TV = z_TV.float().log_softmax(-1)
    with torch.no_grad():
        q_TV = (z_TV.float() / GEM().beta).softmax(-1)
    log_p_y_T1 = log_p_TV.gather(1, y_T[:, None])
    return -(q_TV * (log_p_y_T1 - log_p_TV)).sum()


TWIN = " in plain torch"
LOSSES: dict[str, Loss] = {
    "ours: ce": ours(CrossEntropy()),
    "ours: gem linear": ours(GEM()),
    "ours: gem logsigmoid": ours(GEM(h="logsigmoid")),
    "ours: sed": ours(SED(0.9)),
    "megatron: vocab-parallel ce": megatron_cross_entropy,
    "torch: cross_entropy(z.float())": torch_cross_entropy,
    "textbook: gem linear": textbook_gem,
}


def step(name: str, z_TV: Tensor, y_T: Tensor) -> None:
    """Forward and backward to the logits; keeps nothing."""
    twin = (
        mock.patch.object(closed_form, "choose", return_value=plain)
        if name.endswith(TWIN)
        else contextlib.nullcontext()
    )
    with twin:
        torch.autograd.grad(LOSSES[name.removesuffix(TWIN)](z_TV, y_T), z_TV)


def count(result: Result, z_TV: Tensor, y_T: Tensor) -> None:
    z_TV = z_TV.clone().requires_grad_()
    with Traffic(z_TV) as traffic:
        step(result.name, z_TV, y_T)
    result.memory_bytes_per_logit = traffic.memory / z_TV.numel()
    result.cache_bytes_per_logit = traffic.cache / z_TV.numel()
    result.peak_bytes_per_logit = traffic.peak / z_TV.numel()
    result.collectives, result.floats_per_row = traffic.collectives, traffic.sent / len(y_T)


def seconds(name: str, z_TV: Tensor, y_T: Tensor) -> float:
    """Seconds of one step, on logits that no step has overwritten."""
    z_TV = z_TV.clone().requires_grad_()
    if z_TV.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(name, z_TV, y_T)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    step(name, z_TV, y_T)
    return time.perf_counter() - before


def cuda_peak(name: str, z_TV: Tensor, y_T: Tensor) -> float:
    z_TV = z_TV.clone().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(name, z_TV, y_T)
    return (torch.cuda.max_memory_allocated() - before) / z_TV.numel()


def measure(z_TV: Tensor, y_T: Tensor, repetitions: int) -> list[Result]:
    """Runs each loss once to warm up and to count operations, then all interleaved: A B C A B C ..."""
    twins = [name + TWIN for name in LOSSES if z_TV.is_cuda and name.startswith("ours")]
    results = [Result(name) for name in [*LOSSES, *twins]]
    for result in results:
        step(result.name, z_TV.clone().requires_grad_(), y_T)
        if z_TV.is_cuda:
            result.peak_bytes_per_logit = cuda_peak(result.name, z_TV, y_T)
        else:
            count(result, z_TV, y_T)
    for _ in range(repetitions):
        for result in results:
            result.seconds.append(seconds(result.name, z_TV, y_T))
    return results


def bandwidth() -> float:
    """Peak memory bandwidth of the GPU in bytes per second: clock times 2 transfers times bus width."""
    device = torch.cuda.get_device_properties(0)
    return 2 * device.memory_clock_rate * 1e3 * device.memory_bus_width / 8


def machine(device: str) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("torch", "triton", "megatron-core")}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), **versions}
    return {"device": f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores", **versions}


def table(results: list[Result], z_TV: Tensor) -> list[str]:
    T, numel = len(z_TV), z_TV.numel()
    size = z_TV.element_size()
    rows = [
        f"{'bytes per logit:':36}{'memory':>7}{'cache':>7}{'peak':>7}  collectives  floats/token   ms (range)  tokens/s"
        f"{'times ' + results[0].name:>26}"
    ]
    for r in results:
        numbers = [r.memory_bytes_per_logit, r.cache_bytes_per_logit, r.peak_bytes_per_logit]
        cells = "".join(f"{'' if x is None else format(x, '.2f'):>7}" for x in numbers)
        sent = "" if r.collectives is None else f"{r.collectives:>13}{r.floats_per_row:>12g}"
        spread = f"{1e3 * r.median:.3g} ({1e3 * min(r.seconds):.3g}-{1e3 * max(r.seconds):.3g})"
        row = f"{r.name:36}{cells}{sent:25}{spread:>20}{T / r.median:>12.0f}"
        low, ratio, high = ratios(r.seconds, results[0].seconds)
        row += f"{f'{ratio:.3f} ({low:.3f}-{high:.3f})':>24}"
        if z_TV.is_cuda:
            rate = FLOOR * size * numel / r.median
            row += f"  floor's bytes at {rate / 1e9:.0f} GB/s, {rate / bandwidth():.0%} of the memory's"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, help="tokens and vocabulary of a published model's training step")
    parser.add_argument("--tokens", type=int, help="number of tokens (512; 4096 on CUDA)")
    parser.add_argument("--vocabulary", type=int, help="columns (32768; 152064 on CUDA)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the same here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, V = (4096, 152064) if device == "cuda" else (512, 32768)
    if options.like:
        T, V = SHAPES[options.like].seq, SHAPES[options.like].vocab
    T, V = options.tokens or T, options.vocabulary or V
    if T * V * DTYPES[options.dtype].itemsize < 8 * plain.BLOCK_BYTES[device]:
        parser.error(f"{T} x {V} logits are too few to tell them from blocks: give more --tokens or --vocabulary")
    warnings.filterwarnings("ignore")  # upstream's warnings about optional packages
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        generator = torch.Generator(device).manual_seed(0)
        z_TV = torch.randn(T, V, generator=generator, device=device, dtype=DTYPES[options.dtype]) * 3
        y_T = torch.randint(0, V, (T,), generator=generator, device=device)
        results = measure(z_TV, y_T, options.repetitions)
        dist.destroy_process_group()
    shape = {"tokens": T, "vocabulary": V, "dtype": options.dtype, "repetitions": options.repetitions}
    about = machine(device) | {"block_bytes": plain.BLOCK_BYTES[device]}
    print(*(f"{key}: {value}" for key, value in (about | shape).items()), sep="; ")
    print(*table(results, z_TV), sep="\n")
    print(LEGEND)
    if options.json:
        first = results[0].seconds
        rows = [asdict(r) | {"median_seconds": r.median, "times_first": ratios(r.seconds, first)} for r in results]
        options.json.write_text(json.dumps({"machine": about, "shape": shape, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
