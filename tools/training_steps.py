"""Training steps to time: models of one shape with their optimizers, with and without SFR, on synthetic data.

Imports Megatron: choose the backend first (`runtime.backend.prepare`). B samples, S positions, A anchors, D dimension.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sfr.config.build import model_config
from megatron_sfr.config.run_plan import plan_run
from megatron_sfr.config.settings import parse, read_settings
from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.runtime import backend
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.step_context import StepContext


@dataclass
class Arm:
    """One kind of step: its name, a function that takes one, and what was measured."""

    name: str
    take: Callable[[], None]
    static_bytes: int = 0
    """Of the model, its gradients and, after a first step, its optimizer; CUDA only."""
    flops: int = 0
    operations: int = 0
    peak_bytes: int = 0


class Operations(TorchDispatchMode):
    """Counts what is dispatched: on a GPU each is about one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "view" not in func.name() and "detach" not in func.name()
        return func(*args, **(kwargs or {}))


def flags(sizes: argparse.Namespace) -> list[str]:
    """Megatron's flags for one rank and these sizes."""
    given = {
        "num-layers": sizes.layers,
        "hidden-size": sizes.hidden,
        "ffn-hidden-size": sizes.ffn,
        "num-attention-heads": sizes.heads,
        "num-query-groups": sizes.groups,
        "kv-channels": sizes.kv_channels,
        "seq-length": sizes.seq,
        "max-position-embeddings": sizes.seq,
        "vocab-size": sizes.vocab,
        "micro-batch-size": sizes.batch,
        "global-batch-size": sizes.batch,
        "train-iters": 10**6,
        "lr": 1e-4,
        "train-data-path": "unread",
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": sizes.transformer_impl,
    }
    if sizes.fp8:
        given |= {"fp8-format": "hybrid", "fp8-recipe": sizes.fp8}
    switches = ["swiglu", "disable-bias-linear", "no-check-for-nan-in-loss-and-grad", "group-query-attention"]
    switches += ["untie-embeddings-and-output-weights"]
    switches += ["bf16"] if sizes.bf16 else []
    return [word for k, v in given.items() for word in (f"--{k}", str(v))] + [f"--{switch}" for switch in switches]


def make_batch(sizes: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, all supervised, with evenly spaced anchors and random targets."""
    g = torch.Generator().manual_seed(0)
    B, S, A, D = sizes.batch, sizes.seq, sizes.anchors, sizes.dim
    tokens = torch.randint(0, sizes.vocab, (B, S + 1), generator=g)
    position = torch.linspace(0, S - 1, A).long().repeat(B, 1)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(B, S),
        "position_ids": torch.arange(S).repeat(B, 1),
        "anchor_position": position,
        "anchor_place": position,
        "anchor_sample": torch.arange(B)[:, None].repeat(1, A),
        "anchor_row": torch.arange(A).repeat(B, 1),
        "anchor_horizon": torch.zeros(B, A, dtype=torch.int64),
        "anchor_weight": torch.full((B, A), S / A),
        "target": torch.nn.functional.normalize(torch.randn(B, A, D, generator=g), dim=-1).half(),
    }
    return {name: x.to(device) for name, x in batch.items()}


def allocated() -> int:
    """Bytes of live tensors on the GPU; 0 on CPU, where torch does not count them."""
    return torch.cuda.memory_allocated() if backend.device().type == "cuda" else 0


@dataclass(frozen=True)
class Built:
    """A model with its optimizer, and the bytes that they took on the GPU."""

    model: Any
    optimizer: Any
    bytes: int


Hook = Callable[[list[Any]], list[Any]]


def begin(sizes: argparse.Namespace) -> argparse.Namespace:
    """Megatron's arguments for these sizes, with Megatron started."""
    settings = read_settings(flags(sizes))
    args = parse(settings)
    if args.transformer_impl != sizes.transformer_impl:
        raise SystemExit(f"--transformer-impl {sizes.transformer_impl} cannot be timed here: {settings.changes[0]}")
    training.initialize_megatron()
    args.curr_iteration = 0
    return args


def build(
    args: argparse.Namespace,
    backend_name: Literal["cpu", "cuda"],
    head: FlowHeadPlan | None,
    hooks: Sequence[Hook] = (),
) -> Built:
    """Builds a model and its optimizer, with a flow head and upstream's pre-wrap hooks if they are given."""
    before = allocated()
    config = model_config(plan_run(args, backend_name))
    config.head = head
    config.pre_wrap_hooks.extend(hooks)
    (model,), optimizer, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return Built(model, optimizer, allocated() - before)


def make_arm(
    name: str,
    built: Built,
    args: argparse.Namespace,
    batch: dict[str, torch.Tensor],
    term: FlowTerm | None = None,
    measure_interval: int = 0,
) -> Arm:
    """A step of cross-entropy, and of SFR if there is a term."""
    schedule = ScheduleOptions(measure_interval=measure_interval)
    forward = ForwardStep(args.vocab_size, "ce", CrossEntropy(), term, schedule, False)

    def take() -> None:
        args.curr_iteration += 1
        built.model.zero_grad_buffer()
        built.model.set_is_first_microbatch()  # as upstream's schedule does: FP8 layers then quantize their new weights
        built.optimizer.zero_grad()
        # Upstream's check for NaN runs in its own training loop only.
        context = StepContext(args.curr_iteration, 2**20, 1, None, args.transformer_impl, checks_nan=False)
        output, loss = forward(iter([batch]), built.model, context)
        total, tokens, _ = loss(output)
        (total / tokens).backward()
        built.optimizer.step()

    return Arm(name, take, built.bytes)


def make_arms(sizes: argparse.Namespace, backend_name: Literal["cpu", "cuda"]) -> list[Arm]:
    """A step of cross-entropy, of SFR, and of SFR with its gradients measured; the last two share a model."""
    args = begin(sizes)
    head = FlowHeadOptions(architecture=sizes.head, width=sizes.width, depth=sizes.depth)
    term = FlowTerm(TermOptions(SFROptions(draws=sizes.draws), TargetOptions(), GateOptions(), head))
    batch = make_batch(sizes, backend.device())
    plain, with_head = (build(args, backend_name, plan) for plan in (None, FlowHeadPlan(head, sizes.dim)))
    return [
        make_arm("ce", plain, args, batch),
        make_arm("sfr", with_head, args, batch, term),
        make_arm("sfr, gradients measured", with_head, args, batch, term, 1),
    ]
