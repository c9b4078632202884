"""What a node of a job reports about itself, so that nodes can be compared."""

import hashlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from megatron_sfr.runtime.devices import NVIDIA_DRIVER

COMPARED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "NVTE_", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class NodeFacts:
    """One process's view of its node. The processes of a node report the same."""

    host: str
    addresses: tuple[str, ...]
    software: dict[str, str]
    """Python, torch, CUDA, NCCL, driver, GPUs, collectives, and a hash of megatron_sfr's own files."""
    packages: dict[str, str]
    """Version of each installed package."""
    required: tuple[str, ...]
    """Those packages that megatron-sfr and its requirements need."""
    variables: dict[str, str]
    """Environment variables that change collectives or numbers."""


def read_node_facts(host: str) -> NodeFacts:
    """The facts of this process's node. Imports torch."""
    import psutil

    from megatron_sfr.doctor.required_packages import PACKAGE, installed, requirements_of
    from megatron_sfr.doctor.torch_facts import read_torch_facts

    build = read_torch_facts()
    kinds = [gpu.name for gpu in build.gpus]
    software = {
        "Python": platform.python_version(),
        "torch": build.version,
        "CUDA of torch": build.cuda or "none",
        "NCCL": build.nccl or "not used",
        "collectives": ", ".join(build.backends),
        "NVIDIA driver": driver_version(),
        "GPUs": ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none",
        "files of megatron_sfr": hash_of_sources(Path(__file__).resolve().parents[1]),
    }
    names = {name for requirement, _ in requirements_of(PACKAGE) if installed(name := requirement.name.lower())}
    addresses = [one.address for card in psutil.net_if_addrs().values() for one in card]
    variables = {name: value for name, value in os.environ.items() if name.startswith(COMPARED_VARIABLES)}
    packages = {one.name.lower(): one.version for one in reversed(list(distributions()))}  # the first on the path wins
    return NodeFacts(host, tuple(addresses), software, packages, tuple(sorted(names)), variables)


def driver_version() -> str:
    """Such as 580.65.06; 'none' without a driver."""
    if not NVIDIA_DRIVER.exists():
        return "none"
    words = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def hash_of_sources(package: Path) -> str:
    """The first 12 digits of a hash of the Python files below a folder: nodes with separate checkouts can differ."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
