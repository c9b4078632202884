"""Chooses CPU with gloo or CUDA with NCCL, once a process, and says what the choice changes in Megatron's flags."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

Name = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class BackendOptions:
    """Where the training runs."""

    sfr_backend: Name = "auto"
    """'cuda' (NCCL), 'cpu' (gloo; development, tests and the demo), or 'auto': cuda where there is one."""


def choose(name: Name) -> Literal["cpu", "cuda"]:
    """The backend that a name means on this machine; ValueError where CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--sfr-backend cuda: torch sees no CUDA device; use --sfr-backend cpu, or check the driver")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def start(backend: Literal["cpu", "cuda"]) -> None:
    """Prepares the process; on CPU replaces what upstream asks of CUDA and joins the gloo group of torchrun."""
    from megatron_sfr.runtime import cpu, resharding

    if backend == "cuda":
        resharding.install()
        return
    cpu.install()
    resharding.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def join(backend: Literal["cpu", "cuda"]) -> None:
    """Prepares the process as one of torchrun's ranks or, without it, as the only one; upstream starts nothing."""
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
    """The device of this process's tensors, once a backend was started."""
    return torch.device(torch.cuda.current_device())


@dataclass(frozen=True)
class Change:
    """A Megatron argument that is needed otherwise: its name, the value that works, the flags that set it."""

    dest: str
    value: Any
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """A Megatron argument that cannot work on CPU, and what to do about it."""

    dest: str
    works: Callable[[Any], bool]
    reason: str


UNFUSED = Change("gradient_accumulation_fusion", False, ("--no-gradient-accumulation-fusion",))
CPU_CHANGES = (
    Change("transformer_impl", "local", ("--transformer-impl", "local")),
    Change("distributed_backend", "gloo", ("--distributed-backend", "gloo")),
    Change("use_cpu_initialization", True, ("--use-cpu-initialization",)),
    UNFUSED,
    Change("no_persist_layer_norm", True, ("--no-persist-layer-norm",)),
    Change("apply_rope_fusion", False, ("--no-rope-fusion",)),
    Change("masked_softmax_fusion", False, ("--no-masked-softmax-fusion",)),
    Change("bias_swiglu_fusion", False, ("--no-bias-swiglu-fusion",)),
    Change("bias_gelu_fusion", False, ("--no-bias-gelu-fusion",)),
    Change("bias_dropout_fusion", False, ("--no-bias-dropout-fusion",)),
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
)


def adapt_flags(backend: Literal["cpu", "cuda"], args: Any) -> tuple[list[str], list[str]]:
    """What the backend changes in parsed arguments: flags to add, lines that say so. ValueError if none can help."""
    changes: tuple[Change, ...] = ()
    if backend == "cpu":
        changes = CPU_CHANGES
        for refusal in CPU_REFUSALS:
            if not refusal.works(getattr(args, refusal.dest)):
                raise ValueError(f"--{refusal.dest.replace('_', '-')} cannot work on CPU: {refusal.reason}")
        parallel = args.tensor_model_parallel_size > 1 and args.expert_model_parallel_size > 1
        if parallel and args.expert_tensor_parallel_size != 1:
            raise ValueError(
                "tensor parallel experts cannot work on CPU beside --expert-model-parallel-size: gloo gathers equal "
                "sizes only; set --expert-tensor-parallel-size 1"
            )
    elif importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        changes = (UNFUSED,)  # on by default upstream, whose LM head then raises where Apex's extension is not built
    changes = tuple(c for c in changes if getattr(args, c.dest) != c.value)
    flags = [flag for change in changes for flag in change.flags]
    return flags, [f"{c.dest}: {getattr(args, c.dest)} -> {c.value}" for c in changes]


def adapt_config_to_cpu(config: Any) -> None:
    """What no flag reaches. gloo's asynchronous sends read a stage's output after upstream has freed it."""
    config.deallocate_pipeline_outputs = False
