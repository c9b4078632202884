"""Measures the LM head with its loss (`python -m tools.bench_head`): peak memory and time, forward and backward.

Compares ours in chunks with ours over all logits, Megatron's vocab-parallel cross-entropy, torch's, Liger's fused
linear cross-entropy (on CUDA, if it is installed) and the three matrix products alone. All compute cross-entropy over
the supervised positions, the gradient of the hidden states, and add the weight's gradient to an fp32 buffer, as
Megatron does. One rank. T positions, N supervised ones, C of a chunk, H hidden size, V columns.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module, util
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.chunked_head import ChunkPlan, LMHead, chunked_loss
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from tools.bench_loss import DTYPES, machine
from tools.bench_overhead import ratios
from tools.traffic import Traffic

LEGEND = """\
peak: largest number of bytes alive beyond hidden states, weight and the weight's gradient buffer, in MiB and in chunks
of logits; on a CPU it is counted from torch's operations. times all logits: the time over that of the first line, step
by step, median and quartiles."""
ALL_AT_ONCE = "ours, all logits"


@dataclass
class Case:
    """Inputs of one measurement."""

    h_TH: Tensor
    weight_VH: Tensor
    buffer_VH: Tensor
    y_T: Tensor
    index_N: Tensor
    chunk: int


@dataclass
class Result:
    """One way to compute the head."""

    name: str
    peak: int = 0
    seconds: list[float] = field(default_factory=list)


def chunks(case: Case) -> None:
    def project(h_CH: Tensor) -> Tensor:
        with torch.no_grad():
            return h_CH @ case.weight_VH.t()

    head = LMHead(project, case.weight_VH, Vocab(len(case.weight_VH)), accumulator_VH=case.buffer_VH)
    y_N = case.y_T[case.index_N]
    total, *_ = chunked_loss(case.h_TH, case.index_N, y_N, CrossEntropy(), head, ChunkPlan(case.chunk))
    total.backward(inputs=[case.h_TH])


def all_logits(loss: Callable[[Tensor, Tensor], Tensor], case: Case) -> None:
    """Logits of all positions, and a loss that autograd differentiates."""
    loss(case.h_TH @ case.weight_VH.t(), case.y_T).backward()
    add_gradient(case)


def add_gradient(case: Case) -> None:
    """As Megatron's DDP does after the backward pass."""
    assert case.weight_VH.grad is not None
    case.buffer_VH.add_(case.weight_VH.grad)
    case.weight_VH.grad = None


def ours(z_TV: Tensor, y_T: Tensor) -> Tensor:
    return vocab_parallel_loss(z_TV, y_T, CrossEntropy(), Vocab(z_TV.shape[1]), overwrite=True)[0].sum()


def megatrons(z_TV: Tensor, y_T: Tensor) -> Tensor:
    """Upstream has no ignored labels: the mask multiplies the losses."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    loss_T1 = vocab_parallel_cross_entropy(z_TV[:, None], y_T.clamp(min=0)[:, None], tp_group=dist.group.WORLD)
    return (loss_T1[:, 0] * (y_T >= 0)).sum()


def torchs(z_TV: Tensor, y_T: Tensor) -> Tensor:
    return F.cross_entropy(z_TV.float(), y_T, reduction="sum", ignore_index=IGNORED)


def liger(case: Case) -> None:
    kind = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    loss = kind(ignore_index=IGNORED, reduction="sum")
    loss(case.weight_VH, case.h_TH, case.y_T).backward()
    add_gradient(case)


def products(case: Case) -> None:
    """The floor: the three matrix products over supervised positions, in chunks, without a loss."""
    with torch.no_grad():
        case.h_TH.grad = torch.zeros_like(case.h_TH)
        for rows_C in case.index_N.split(case.chunk):
            h_CH = case.h_TH[rows_C]
            z_CV = h_CH @ case.weight_VH.t()
            case.h_TH.grad[rows_C] = z_CV @ case.weight_VH
            if z_CV.dtype == case.buffer_VH.dtype:
                case.buffer_VH.addmm_(z_CV.t(), h_CH)
            else:
                case.buffer_VH += z_CV.t() @ h_CH
            del z_CV


WAYS: dict[str, Callable[[Case], None]] = {
    ALL_AT_ONCE: partial(all_logits, ours),
    "ours, chunks": chunks,
    "megatron: vocab-parallel ce": partial(all_logits, megatrons),
    "torch: cross_entropy(z.float())": partial(all_logits, torchs),
    "floor: the products": products,
}


def step(way: Callable[[Case], None], case: Case) -> float:
    """Seconds of one step."""
    case.h_TH.grad = None
    if case.h_TH.is_cuda:
        torch.cuda.synchronize()
    before = time.perf_counter()
    way(case)
    if case.h_TH.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - before


def peak(way: Callable[[Case], None], case: Case) -> int:
    case.h_TH.grad = None
    if case.h_TH.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(case)
        return torch.cuda.max_memory_allocated() - before
    with Traffic(case.weight_VH) as traffic:
        way(case)
    return traffic.peak


def make_case(options: argparse.Namespace, share: float, device: str) -> Case:
    g, dtype = torch.Generator(device).manual_seed(0), DTYPES[options.dtype]
    T, H, V = options.tokens, options.hidden, options.vocabulary
    h_TH = torch.randn(T, H, generator=g, device=device).to(dtype).requires_grad_()
    weight_VH = (torch.randn(V, H, generator=g, device=device) / H**0.5).to(dtype).requires_grad_()
    y_T = torch.randint(V, (T,), generator=g, device=device)
    index_N = torch.randperm(T, generator=g, device=device)[: round(share * T)].sort().values
    ignored_T = torch.ones(T, dtype=torch.bool, device=device).index_fill(0, index_N, False)
    y_T[ignored_T] = IGNORED
    return Case(h_TH, weight_VH, torch.zeros(V, H, device=device), y_T, index_N, options.chunk)


def measure(ways: dict[str, Callable[[Case], None]], case: Case, repetitions: int) -> list[Result]:
    """One step of each to warm up and one for the peak, then all interleaved: A B C A B C ..."""
    results = [Result(name) for name in ways]
    for result in results:
        step(ways[result.name], case)
        result.peak = peak(ways[result.name], case)
    for _ in range(repetitions):
        for result in results:
            result.seconds.append(step(ways[result.name], case))
    return results


def table(results: list[Result], case: Case) -> list[str]:
    chunk_bytes = min(case.chunk, max(1, len(case.index_N))) * case.weight_VH[:, :1].numel() * case.h_TH.element_size()
    lines = [f"{'':34}{'peak MiB':>9}{'chunks':>8}{'ms (range)':>22}{'times all logits':>24}"]
    for result in results:
        low, ratio, high = ratios(result.seconds, results[0].seconds)
        ms = [1e3 * x for x in (statistics.median(result.seconds), min(result.seconds), max(result.seconds))]
        lines.append(
            f"{result.name:34}{result.peak / 2**20:>9.1f}{result.peak / chunk_bytes:>8.2f}"
            f"{f'{ms[0]:.0f} ({ms[1]:.0f}-{ms[2]:.0f})':>22}{f'{ratio:.3f} ({low:.3f}-{high:.3f})':>24}"
        )
    return lines


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 512)
    parser.add_argument("--vocabulary", type=int, default=151936 if cuda else 16384)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 256)
    parser.add_argument("--chunk", type=int, default=4096 if cuda else 128)
    parser.add_argument("--supervised", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="shares of the tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the same here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    warnings.filterwarnings("ignore")  # upstream's warnings about optional packages
    ways = dict(WAYS)
    if device == "cuda" and util.find_spec("liger_kernel") is not None:
        ways["liger: fused linear ce"] = liger
    about = machine(device) | {"load": f"{os.getloadavg()[0]:.1f}"}
    about |= {
        name: getattr(options, name) for name in ("tokens", "vocabulary", "hidden", "chunk", "dtype", "repetitions")
    }
    print(*(f"{key}: {value}" for key, value in about.items()), sep="; ")
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for share in options.supervised:
            case = make_case(options, share, device)
            results = measure(ways, case, options.repetitions)
            print(f"{share:.0%} supervised", *table(results, case), sep="\n", flush=True)
            cases[share] = [asdict(r) | {"times_all_logits": ratios(r.seconds, results[0].seconds)} for r in results]
        dist.destroy_process_group()
    print(LEGEND)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
