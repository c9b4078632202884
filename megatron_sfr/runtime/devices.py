"""Accelerators: those of this machine, for commands that run before a backend is chosen, and those of data sheets.

torch is imported where it is used: `doctor` reads this module before it knows whether torch can be imported.
"""

import os
import resource
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_sfr.storage.user_files import is_out_of_memory, reason, shown

if TYPE_CHECKING:
    from torch import Tensor

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

BF16, FP8 = "bf16", "fp8"


@dataclass(frozen=True)
class KnownGpu:
    """A GPU as its data sheet describes it."""

    names: tuple[str, ...]
    """By which torch knows it."""
    memory: int
    """Bytes that torch reports, of which a CUDA context takes some."""
    peaks: dict[str, float]
    """Dense TFLOP/s by precision. NVIDIA's data sheets give twice as much, with sparsity."""


_HOPPER = {BF16: 989.4, FP8: 1978.9}
KNOWN_GPUS = {
    "a100": KnownGpu(("NVIDIA A100-SXM4-80GB",), int(79.1 * 2**30), {BF16: 312.0}),
    "h100": KnownGpu(("NVIDIA H100 80GB HBM3",), int(79.1 * 2**30), _HOPPER),
    "h200": KnownGpu(("NVIDIA H200",), int(139.8 * 2**30), _HOPPER),
    "b200": KnownGpu(("NVIDIA B200",), int(178.3 * 2**30), {BF16: 2250.0, FP8: 4500.0}),
}
"""SXM modules. A PCIe or NVL card has another peak and is not listed: no MFU is printed for it."""


def peak(device: str, precision: str) -> float | None:
    """Peak of a GPU by the name that torch gives it, in TFLOP/s; None where it is not in the table."""
    return next((gpu.peaks.get(precision) for gpu in KNOWN_GPUS.values() if device in gpu.names), None)


def peak_memory() -> int:
    """Bytes that this process has had at most: of its GPU, or else of the machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gpu_name(backend: Literal["cpu", "cuda"]) -> str | None:
    """torch's name of this process's GPU; None on CPU."""
    import torch

    return torch.cuda.get_device_name() if backend == "cuda" else None


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; memory in bytes, capability as (major, minor): Hopper is (9, 0)."""

    name: str
    memory: int
    capability: tuple[int, int]


def gpus() -> list[Gpu]:
    import torch

    with warnings.catch_warnings():  # an old driver makes torch warn; an empty list says the same
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in properties]


def launching_on(x: "Tensor") -> AbstractContextManager[Any]:
    """Context in which Triton launches kernels on the GPU of a tensor: it takes the current one, not the arguments'."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def usable_device(name: str | None) -> str:
    """The device of that name, by default a GPU if there is one. Raises ValueError if it cannot compute."""
    import torch

    if name is None:
        return "cuda" if gpus() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # fails on `meta`, which holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(len(gpus())))])
        raise ValueError(f"device {shown(name)} cannot be used ({reason(error)}); this machine has {known}") from error
    return name


def driver_is_there() -> bool:
    """True if this machine has an NVIDIA driver and its devices were not hidden on purpose."""
    return NVIDIA_DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def backends() -> list[str]:
    """The collective backends that this build of torch can use."""
    import torch.distributed as dist

    there = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, is_available in there.items() if dist.is_available() and is_available()]


def nccl_version() -> str | None:
    """The version of the NCCL that torch uses, such as 2.29.7; None in a build without it."""
    import torch
    import torch.distributed as dist

    return ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
