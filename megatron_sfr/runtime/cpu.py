"""Unmodified megatron-core on CPU and gloo: every upstream name that is replaced for it, and why.

The tables are written against the VERSIONS of runtime/replacements.py. On CUDA only TORCH_ADAM is applied, and only
where neither Transformer Engine nor Apex provides an optimizer.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_sfr.runtime.replacements import Replacement, wrapper

CPU = torch.device("cpu")


class NullStream:
    """Replaces CUDA's Stream and Event: on CPU every call has completed when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("wait_stream", "wait_event", "wait", "synchronize", "record"):
            return lambda *_, **__: None
        if name == "record_event":
            return lambda *_: self
        if name == "query":
            return lambda: True
        if name == "elapsed_time":
            return lambda _: 0.0
        raise AttributeError(name)


NAMING_A_DEVICE = frozenset(
    {torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.record_stream, torch.Tensor.type, torch.Tensor.to}
)
"""Functions that name a device, or the type of a device's tensors, without a keyword."""


class CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA by CPU wherever a torch function names a device."""

    def __torch_function__(self, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not kwargs and func not in NAMING_A_DEVICE:  # nearly all calls, tens of thousands in a step
            return func(*args)
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizers and gradient clipping check param.type() == "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _properties(_: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1)


@wrapper
def _no_cuda_needed(initialize: Any) -> Any:
    return functools.partial(initialize, allow_no_cuda=True)


@wrapper
def _compile_only_if_missing(compile_helpers: Any) -> Any:
    def ensure() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            compile_helpers()

    return ensure


def _nothing(*_: Any, **__: Any) -> None: ...


@wrapper
def _state_without_step(set_states: Any) -> Any:
    def without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    return without_step


@wrapper
def _freed_after_backward(free: Any) -> Any:
    def keep(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        if isinstance(out, torch.Tensor) and out.grad_fn is not None:
            out.grad_fn.metadata["data"] = out.data  # type: ignore[index]  # lives as long as the graph
        free(out, deallocate_pipeline_outputs)

    return keep


@functools.lru_cache(maxsize=32)
def _causal_mask(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@functools.lru_cache(maxsize=32)
def _window_mask(queries: int, keys: int, window_size: tuple[int, int]) -> torch.Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return ~seen.triu(keys - queries - window_size[0]).tril(keys - queries + window_size[1])


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


@wrapper
def _primed(sharded_state_dict: Any) -> Any:
    def primed(self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        return sharded_state_dict(self, model_state, is_loading, *args, **kwargs)

    return primed


@wrapper
def _own_steps(load_state_dict: Any) -> Any:
    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return with_own_steps


RANDOM = "megatron.core.tensor_parallel.random"
TRAINING = "megatron.training.training"
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"

TORCH = (
    Replacement("torch.cuda", "current_device", lambda: CPU, "device=torch.cuda.current_device() in about sixty calls"),
    Replacement("torch.cuda", "set_device", _nothing, "initialization pins each rank to its GPU"),
    Replacement("torch.cuda", "device_count", lambda: 1, "upstream builds its process groups only if it counts a GPU"),
    Replacement("torch.cuda", "get_device_properties", _properties, "argument validation asks for the architecture"),
    Replacement(
        "torch.cuda", "get_device_capability", lambda _=None: (9, 0), "argument validation asks for the architecture"
    ),
    Replacement("torch.cuda", "synchronize", _nothing, "p2p, timers and checkpointing"),
    Replacement("torch.cuda", "empty_cache", _nothing, "warm-up and checkpointing"),
    Replacement("torch.cuda", "Stream", NullStream, "side streams of DDP, p2p and checkpointing"),
    Replacement("torch.cuda", "Event", NullStream, "timers and asynchronous saving"),
    Replacement("torch.cuda", "current_stream", NullStream, "side streams wait for the current one"),
    Replacement("torch.cuda", "default_stream", NullStream, "side streams wait for the current one"),
    Replacement("torch.cuda", "stream", lambda _: contextlib.nullcontext(), "side streams"),
    # torch.manual_seed itself calls torch.cuda.manual_seed_all: replacing that one too would never end.
    Replacement("torch.cuda", "manual_seed", _manual_seed, "the dropout tracker seeds the device's generator"),
    Replacement("torch.cuda", "get_rng_state", _rng_state, "the dropout tracker and checkpoints"),
    Replacement("torch.cuda", "set_rng_state", _set_rng_state, "the dropout tracker and checkpoints"),
)
TORCH_ADAM = (
    Replacement(
        DISTRIBUTED,
        "DistributedOptimizer.sharded_state_dict",
        _primed,
        "loading reads the state of a torch Adam that has not created it yet, and asserts",
        ("self", "model_sharded_state_dict", "is_loading"),
    ),
    Replacement(
        DISTRIBUTED,
        "DistributedOptimizer.load_state_dict",
        _own_steps,
        "all parameters of torch Adam get one step tensor, which each of them then increments",
        ("self", "state_dict"),
    ),
    Replacement(
        DISTRIBUTED,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        _state_without_step,
        "loading copies a placeholder over the loaded step, and in fp32 copies into views of leaves",
        ("self", "model_param", "tensors"),
    ),
)
MEGATRON = (
    Replacement(RANDOM, "_get_cuda_rng_state", _rng_state, "reads the CUDA generator itself"),
    Replacement(RANDOM, "_set_cuda_rng_state", _set_rng_state, "writes the CUDA generator itself"),
    Replacement(TRAINING, "initialize_megatron", _no_cuda_needed, "asserts CUDA by default", ("allow_no_cuda",)),
    Replacement(TRAINING, "set_jit_fusion_options", _nothing, "warms up compiled kernels that are disabled on CPU"),
    Replacement(
        "megatron.core.pipeline_parallel.schedules",
        "deallocate_output_tensor",
        _freed_after_backward,
        "frees the memory of a stage's output, which gloo's asynchronous sends still read",
        ("out", "deallocate_pipeline_outputs"),
    ),
    Replacement(
        "megatron.core.fusions.fused_softmax",
        "get_default_causal_mask",
        _causal_mask,
        "makes the mask with device='cuda' inside a recomputed layer, where torch passes function modes by",
    ),
    Replacement(
        "megatron.core.fusions.fused_softmax",
        "get_sliding_window_causal_mask",
        _window_mask,
        "makes the mask with device='cuda' inside a recomputed layer, where torch passes function modes by",
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _splits,
        "turns split sizes of an all-to-all into numbers only on their way from a GPU",
    ),
    Replacement(
        "megatron.core.datasets.utils",
        "compile_helpers",
        _compile_only_if_missing,
        "runs make in a folder without a Makefile and exits, though the wheel ships the module compiled",
    ),
)
REPLACEMENTS = TORCH + TORCH_ADAM + MEGATRON

# Packages of CUDA kernels that upstream uses on any device if they can be imported. Without them it falls back to
# torch's optimizer and norms, which the CPU needs.
HIDDEN_PACKAGES = {
    "transformer_engine": "its FusedAdam and multi-tensor norm need a CUDA driver (core/optimizer/clip_grads.py)",
    "apex": "its FusedAdam and FusedLayerNorm run on CUDA only (core/optimizer/__init__.py)",
    "amp_C": "Apex's multi-tensor norm (core/optimizer/clip_grads.py)",
}


def before_megatron() -> None:
    """Prepares the import of Megatron: hides HIDDEN_PACKAGES and GPUs, and leaves functions uncompiled.

    Where a GPU is visible, the data loader would pin its batches, which takes a CUDA context in each process. Upstream
    decorates functions with torch.compile: no compiler is assumed on the CPU, and without the variable each process
    would import Inductor for it, several seconds.
    """
    for name in HIDDEN_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # how Python itself marks a blocked import
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # until the process has used CUDA
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@functools.cache  # once a process
def repair_torch_adam() -> None:
    """Applies TORCH_ADAM if upstream has fallen back to torch's Adam, on any device."""
    from megatron.core import optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        for entry in TORCH_ADAM:
            entry.apply()


@functools.cache  # once a process
def install() -> None:
    """Applies all tables and enters the function mode, for the rest of the process."""
    before_megatron()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asserted for tensor parallelism on Hopper
    # Dynamo, which upstream's decorators import, refuses one replacement under two names: import it before replacing.
    importlib.import_module("torch._dynamo")
    torch.compiler.set_stance("force_eager")  # for what was decorated before that variable was set
    for entry in TORCH + MEGATRON:
        entry.apply()
    repair_torch_adam()
    # The tracker warns when the CPU generator moves inside a fork; here the CPU generator is the one that is forked.
    logging.getLogger(RANDOM).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    CudaMeansCpu().__enter__()
