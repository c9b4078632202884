"""Measurements of a job's nodes: clocks, a shared folder, speed of each rank, all-reduce, and links between hosts.

Shapes: tensors are vectors of float32, `bytes` long.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sfr.doctor.node_comparison import Clock, FolderCheck, Link, Speed

MIB = 2**20
ROUNDS = 10  # of each small measurement; the best counts, as noise only adds time
PATIENCE_S = 30.0  # network file systems may show new files late
MATRIX = {"cpu": 512, "cuda": 8192}
ALL_REDUCE = {"cpu": (MIB, 8 * MIB, 64 * MIB), "cuda": (8 * MIB, 64 * MIB, 512 * MIB, 2048 * MIB)}
LINK = {"cpu": 8 * MIB, "cuda": 256 * MIB}
COPY = {"cpu": 64 * MIB, "cuda": 1024 * MIB}


@dataclass(frozen=True)
class AllReduce:
    """One size of all-reduce, as nccl-tests define it."""

    bytes: int
    seconds: float
    """Mean of some repetitions on the slowest rank."""
    algbw: float
    """GB/s: bytes over seconds."""
    busbw: float
    """GB/s: algbw × 2 (n - 1) / n for n ranks, which the hardware's bandwidth bounds for any n."""


def bandwidths(size: int, seconds: float, world: int) -> AllReduce:
    algbw = size / seconds / 1e9
    return AllReduce(size, seconds, algbw, algbw * 2 * (world - 1) / world)


def best_time(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        _finish()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure_clock(rank: int, peers: Sequence[int], hosts: Sequence[str]) -> Clock | None:
    """Skew of each peer's clock against rank 0's, by round trips over gloo; the shortest counts (Cristian 1989).

    Returns it on the peers, None on all other ranks. All ranks 0 and `peers` have to call it.
    """
    mine: Clock | None = None
    stamp = torch.zeros(1, dtype=torch.float64)
    for peer in peers:
        for _ in range(ROUNDS if rank in (0, peer) else 0):
            if rank == 0:
                dist.recv(stamp, peer)
                stamp.fill_(time.time())
                dist.send(stamp, peer)
                continue
            sent = time.time()
            dist.send(stamp, 0)
            dist.recv(stamp, 0)
            received = time.time()
            error = (received - sent) / 2
            if mine is None or error < mine.error_s:
                mine = Clock(hosts[peer], (sent + received) / 2 - stamp.item(), error)
    return mine


def check_folder(folder: Path, token: str, rank: int, world: int, wait_for_all: Callable[[], None]) -> FolderCheck:
    """Each rank writes a file and reads those of all ranks; nothing is left behind.

    Args:
        token: of this check, so that files of an earlier one are not taken for those of this one.
        wait_for_all: a barrier of all ranks.
    """
    own = folder / f".megatron-sfr-doctor-{token}"
    error, unseen = None, list(range(world))
    try:
        if not folder.is_dir():
            raise FileNotFoundError(2, "does not exist there", str(folder))
        own.mkdir(exist_ok=True)
        with (own / str(rank)).open("w", encoding="utf-8") as file:
            file.write(f"{token} {rank}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        error = fault.strerror or str(fault)
    wait_for_all()
    end = time.monotonic() + PATIENCE_S
    while error is None and unseen:
        unseen = [other for other in unseen if _read(own / str(other)) != f"{token} {other}"]
        if time.monotonic() > end:
            break
        time.sleep(0.1 if unseen else 0)
    wait_for_all()
    with suppress(OSError):
        (own / str(rank)).unlink()
    wait_for_all()
    with suppress(OSError):  # another rank has removed it
        own.rmdir()
    return FolderCheck(rank, error, tuple(unseen) if error is None else ())


def _read(path: Path) -> str | None:
    """The contents of a file; None while it cannot be read."""
    try:
        os.listdir(path.parent)  # makes network file systems look again
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def measure_speed(rank: int, device: torch.device) -> Speed:
    """Matrix products (fp32 on CPU, bf16 on a GPU) and copies of this rank, without the network."""
    n = MATRIX[device.type]
    x = torch.ones(n, n, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    block = torch.ones(COPY[device.type] // 4, device=device)
    target = torch.empty_like(block)
    matmul = 2 * n**3 / best_time(lambda: x @ x) / 1e12
    return Speed(rank, matmul, 2 * COPY[device.type] / best_time(lambda: target.copy_(block)) / 1e9)


def measure_all_reduce(
    group: dist.ProcessGroup, device: torch.device, wait_for_all: Callable[[], None], sizes: Sequence[int]
) -> Iterator[AllReduce]:
    """Time of each size on the slowest rank. Raises RuntimeError if a sum is wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for size in sizes:
        x = torch.full((size // 4,), float(rank + 1), device=device)
        dist.all_reduce(x, group=group)
        if not bool((x == world * (world + 1) / 2).all()):
            raise RuntimeError(f"an all-reduce of {size} bytes gave a wrong sum: replace the hardware it went through")
        x.zero_()
        wait_for_all()
        started = time.perf_counter()
        for _ in range(rounds := max(3, min(20, 64 * MIB // size))):
            dist.all_reduce(x, group=group)
        _finish()
        seconds = torch.tensor((time.perf_counter() - started) / rounds, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # over gloo, the default group
        yield bandwidths(size, seconds.item(), world)


def edges(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of `count` hosts, in rounds in which no host has two. Two hosts have one link."""
    ring = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    last = [ring.pop()] if count > 2 and count % 2 else []
    return [edge for edge in (ring[::2], ring[1::2], last) if edge]


def measure_links(
    leaders: Sequence[int],
    hosts: Sequence[str],
    group: dist.ProcessGroup,
    device: torch.device,
    wait_for_all: Callable[[], None],
) -> list[Link]:
    """The links between the hosts' first ranks around a ring, those of a round at once. Each link is measured alone.

    Returns the links whose first end this rank is.
    """
    rank, found = dist.get_rank(), []
    large, small = torch.ones(LINK[device.type] // 4, device=device), torch.ones(1, device=device)
    for edges_of_round in edges(len(leaders)):
        wait_for_all()
        for first, second in ((leaders[i], leaders[j]) for i, j in edges_of_round):
            if rank in (first, second):
                latency = best_time(partial(_round_trip, small, small, first, second, group)) / 2
                seconds = best_time(partial(_round_trip, large, small, first, second, group), 3) - latency
                if rank == first:
                    speed = LINK[device.type] / max(seconds, 1e-9) / 1e9
                    found.append(Link(hosts[first], hosts[second], speed, latency))
    return found


def _round_trip(message: Tensor, answer: Tensor, first: int, second: int, group: dist.ProcessGroup) -> None:
    if dist.get_rank() == first:
        dist.send(message, second, group=group)
        dist.recv(answer, second, group=group)
    else:
        dist.recv(message, first, group=group)
        dist.send(answer, first, group=group)
