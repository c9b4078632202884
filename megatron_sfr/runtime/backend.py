"""Chooses CPU with gloo or CUDA with NCCL, once per process, and adapts Megatron's flags to it and to this machine."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml

from megatron_sfr.option_names import named

Name = Literal["auto", "cpu", "cuda"]


@named("sfr_")
@dataclass(frozen=True)
class BackendOptions:
    """Where the training runs."""

    backend: Name = "auto"
    """'cuda' (NCCL), 'cpu' (gloo; development, tests and the demo), or 'auto' (default): cuda if there is a GPU."""


def choose(name: Name) -> Literal["cpu", "cuda"]:
    """The backend that a name selects on this machine. Raises ValueError if CUDA is requested but absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--sfr-backend cuda: torch sees no CUDA device; use --sfr-backend cpu, or check the driver")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def prepare(argv: Sequence[str]) -> None:
    """On the CPU backend, hides what upstream would import for CUDA only. Call before Megatron is imported.

    argv: the run's flags. Only the backend is read from them and from their recipes; config/settings.py checks the
    rest.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sfr-backend", "--sfr_backend")
    parser.add_argument("--recipe", type=Path, action="append", default=[])
    given = parser.parse_known_args(list(argv))[0]
    name = given.sfr_backend
    for path in reversed(given.recipe):
        name = name or _backend_in(path)
    if name == "cpu" or (name in (None, "auto") and not torch.cuda.is_available()):
        from megatron_sfr.runtime import cpu

        cpu.before_megatron()


def _backend_in(recipe: Path) -> str | None:
    if not recipe.is_file():  # to read a pipe would wait
        return None
    try:
        keys = yaml.load(recipe.read_text(encoding="utf-8"), yaml.BaseLoader)  # every value is text
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
        return None  # config/settings.py reads it again and reports what is wrong
    name = keys.get("sfr_backend", keys.get("sfr-backend")) if isinstance(keys, dict) else None
    return name if isinstance(name, str) else None


UNUSED = {
    "transformers": ("megatron.core.tokenizers.text.libraries", "tokenizers for text; the data are token ids"),
    "wandb": ("megatron.core.timers", "compared with the writer; training/tracking/wandb_guard.py sets it again"),
}
"""Packages that upstream imports where they are installed and that a training may not use: where, and what for."""


def import_megatron() -> None:
    """Imports Megatron without UNUSED, which saves each rank two seconds. They can still be imported later."""
    with _hidden(*UNUSED):
        for module, _ in UNUSED.values():
            importlib.import_module(module)


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Context in which packages cannot be imported. Those imported before stay."""
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is how Python marks a blocked import
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def start(backend: Literal["cpu", "cuda"], timeout_minutes: float = 10) -> None:
    """Prepares the process for training. On CPU, replaces upstream's CUDA calls and joins torchrun's gloo group.

    timeout_minutes: after this long a collective of the gloo group fails. Upstream sets it for groups that it creates.
    """
    from megatron_sfr.runtime import cpu

    if backend == "cuda":
        cpu.repair_torch_adam()
        return
    cpu.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))


def join(backend: Literal["cpu", "cuda"]) -> None:
    """Prepares the process as one of torchrun's ranks or, without torchrun, as a single rank, without a training."""
    if backend == "cpu":
        from megatron_sfr.runtime import cpu

        cpu.install()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    name = "gloo" if backend == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(name)
    else:
        dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def device() -> torch.device:
    """The device of this process's tensors, after a backend was started."""
    return torch.device(torch.cuda.current_device())


@dataclass(frozen=True)
class Change:
    """A Megatron argument that needs another value here: its name, the value, the flags that set it, the reason."""

    dest: str
    value: Any
    flags: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Refusal:
    """A Megatron argument that cannot work here, and what to do about it."""

    dest: str
    works: Callable[[Any], bool]
    reason: str


LOCAL = Change("transformer_impl", "local", ("--transformer-impl", "local"))
UNFUSED = Change("gradient_accumulation_fusion", False, ("--no-gradient-accumulation-fusion",))
NO_PERSISTENT_NORM = Change("no_persist_layer_norm", True, ("--no-persist-layer-norm",))
NO_ROPE_FUSION = Change("apply_rope_fusion", False, ("--no-rope-fusion",))
NO_SOFTMAX_FUSION = Change("masked_softmax_fusion", False, ("--no-masked-softmax-fusion",))
CPU_CHANGES: tuple[Change, ...] = (
    LOCAL,
    Change("distributed_backend", "gloo", ("--distributed-backend", "gloo")),
    Change("use_cpu_initialization", True, ("--use-cpu-initialization",)),
    UNFUSED,
    NO_PERSISTENT_NORM,
    NO_ROPE_FUSION,
    NO_SOFTMAX_FUSION,
    Change("bias_swiglu_fusion", False, ("--no-bias-swiglu-fusion",)),
    Change("bias_gelu_fusion", False, ("--no-bias-gelu-fusion",)),
    Change("bias_dropout_fusion", False, ("--no-bias-dropout-fusion",)),
)
NORMS = Refusal(
    "recompute_modules",
    lambda x: "layernorm" not in (x or ()),
    "recomputed norms ask Transformer Engine about FP8; leave layernorm out",
)
CPU_REFUSALS = (
    Refusal("fp8", lambda x: not x, "FP8 needs Transformer Engine on CUDA; leave --fp8-format out"),
    Refusal("fp4", lambda x: not x, "FP4 needs Transformer Engine on CUDA; leave --fp4-format out"),
    Refusal("fp16", lambda x: not x, "fp16 needs CUDA's loss scaling; use --bf16 or fp32"),
    Refusal("tp_comm_overlap", lambda x: not x, "overlapped tensor-parallel communication needs Transformer Engine"),
    Refusal("cuda_graph_impl", lambda x: x in (None, "none"), "CUDA graphs need CUDA"),
    Refusal("use_megatron_fsdp", lambda x: not x, "Megatron FSDP needs CUDA"),
    Refusal(
        "use_torch_fsdp2", lambda x: not x, "torch FSDP 2 is not wired for gloo here; use the distributed optimizer"
    ),
    NORMS,
)

NEEDS_TRANSFORMER_ENGINE = (
    Refusal("fp8", lambda x: not x, "FP8 needs it; leave --fp8-format out"),
    Refusal("fp4", lambda x: not x, "FP4 needs it; leave --fp4-format out"),
    Refusal("context_parallel_size", lambda x: x == 1, "context parallelism needs it"),
    Refusal("tp_comm_overlap", lambda x: not x, "overlapped tensor-parallel communication needs it"),
    NORMS,
)
SOFTMAX_KERNELS = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda")
GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"


def has_transformer_engine() -> bool:
    """Whether Megatron found Transformer Engine when it was imported."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def is_importable(*names: str) -> bool:
    """Whether every module of these names is installed."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def changes_for(backend: Literal["cpu", "cuda"], args: Any) -> tuple[Change, ...]:
    """The arguments that need another value on this backend with the installed packages."""
    changes = CPU_CHANGES if backend == "cpu" else _cuda_changes(args)
    return tuple(change for change in changes if getattr(args, change.dest) != change.value)


def _cuda_changes(args: Any) -> tuple[Change, ...]:
    changes: tuple[Change, ...] = ()
    local = args.transformer_impl == "local"
    if not has_transformer_engine():
        absent, local = "Transformer Engine is not installed", True
        changes += replace(LOCAL, reason=absent), replace(NO_ROPE_FUSION, reason=absent)
    if local:  # torch's norm, which the local spec of multi-token prediction takes, asserts against a persistent one
        changes += (replace(NO_PERSISTENT_NORM, reason="the local spec uses torch's norm"),)
        if not is_importable(*SOFTMAX_KERNELS):
            changes += (replace(NO_SOFTMAX_FUSION, reason="Megatron's softmax extension is not built"),)
    sharded = args.use_megatron_fsdp or args.use_torch_fsdp2
    if (local or sharded) and not is_importable(GRADIENT_KERNEL):
        changes += (replace(UNFUSED, reason="Apex's extension is not built"),)
    return changes


def adapt_flags(backend: Literal["cpu", "cuda"], args: Any) -> tuple[list[str], list[str]]:
    """Changes that the backend needs: flags to add, and lines to print. Raises ValueError if it cannot run."""
    if backend == "cpu":
        _refuse(CPU_REFUSALS, args, "cannot work on CPU")
        parallel = args.tensor_model_parallel_size > 1 and args.expert_model_parallel_size > 1
        if parallel and args.expert_tensor_parallel_size != 1:
            raise ValueError(
                "tensor parallel experts cannot work on CPU beside --expert-model-parallel-size: gloo gathers equal "
                "sizes only; set --expert-tensor-parallel-size 1"
            )
    else:
        if not has_transformer_engine():
            _refuse(NEEDS_TRANSFORMER_ENGINE, args, "cannot work: Transformer Engine is not installed")
        if args.defer_embedding_wgrad_compute and not is_importable(GRADIENT_KERNEL):
            raise ValueError(
                "--defer-embedding-wgrad-compute accumulates the output layer's gradient by Apex's extension "
                f"{GRADIENT_KERNEL}, which is not built: leave it out"
            )
    changes = changes_for(backend, args)
    flags = [flag for change in changes for flag in change.flags]
    because = {change.dest: f" ({change.reason})" if change.reason else "" for change in changes}
    return flags, [f"{c.dest}: {getattr(args, c.dest)} -> {c.value}{because[c.dest]}" for c in changes]


def _refuse(refusals: Sequence[Refusal], args: Any, why: str) -> None:
    for refusal in refusals:
        if not refusal.works(getattr(args, refusal.dest)):
            raise ValueError(f"--{refusal.dest.replace('_', '-')} {why}: {refusal.reason}")


def adapt_config(backend: Literal["cpu", "cuda"], config: Any) -> None:
    """Changes a setting of a model's config that no flag reaches; its `transformer` is Megatron's config.

    On CUDA without Apex's extension the output layer cannot fuse gradient accumulation; Transformer Engine's layers
    still do, by their own kernels (model/gradient_fusion.py).
    """
    if backend == "cuda" and config.transformer.gradient_accumulation_fusion and not is_importable(GRADIENT_KERNEL):
        config.transformer.gradient_accumulation_fusion = False
        config.fuses_layers = True
