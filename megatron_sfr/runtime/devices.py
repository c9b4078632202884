"""The accelerators of this machine, for commands that need to know before a backend is chosen."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sfr.storage.user_files import is_out_of_memory, reason, shown

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; memory in bytes, capability as (major, minor): Hopper is (9, 0)."""

    name: str
    memory: int
    capability: tuple[int, int]


def gpus() -> list[Gpu]:
    with warnings.catch_warnings():  # an old driver makes torch warn; an empty list says the same
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in properties]


def usable_device(name: str | None) -> str:
    """The device of that name, by default a GPU if there is one. Raises ValueError if it cannot compute."""
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
    there = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, is_available in there.items() if dist.is_available() and is_available()]
