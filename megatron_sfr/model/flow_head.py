"""The flow head: predicts the velocity of a future's embedding from its noised value, the time and the hidden state.

It is on the last pipeline stage, replicated over tensor-parallel ranks, and is dropped at inference.
Shapes: B samples, A anchors, K noise draws, D embedding dimension, H hidden size.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_sfr.model.state import FlowState
from megatron_sfr.model.velocity import VELOCITIES
from megatron_sfr.option_names import named

GRADIENT_NORM_GROUP = "sfr_head"
"""Upstream's optimizer clips the parameters of this group separately (see training/head_optimizer.py)."""


@named(
    "sfr_",
    architecture="sfr_head",
    width="sfr_head_width",
    depth="sfr_head_depth",
    precondition="sfr_head_precondition",
)
@dataclass(frozen=True)
class FlowHeadOptions:
    """The flow head.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.FlowHeadOptions(architecture="adaln", depth=3).width
        1024
    """

    architecture: Literal["mlp", "adaln"] = "mlp"
    """Architecture of the head. 'mlp' (default): x_t, t and h concatenated, as in the authors' code. 'adaln': t and h
    modulate the residual blocks, as in MAR (arXiv 2406.11838)."""
    width: int = 1024
    """Width of the head. Default 1024, as in the authors' code and in MAR."""
    depth: int = 1
    """Number of residual blocks of the head. Default 1, as in the authors' code; MAR has 3."""
    time_scale: float = 1000.0
    """Factor on t in [0, 1] before its sinusoidal embedding of base 10000. Default 1000. With the authors' 1 the
    embeddings of nearby t are almost equal."""
    precondition: bool = False
    """Whether the network F learns only what x_t and t do not determine: v = a(t) x_t + b(t) F(b(t) x_t, t, h), with
    b(t) = (t^2 + (1 - t)^2)^(-1/2) and a(t) = (2t - 1) b(t)^2. Its input and what it has to predict then have unit
    variance for targets of unit variance (`sfr_target_scale` sqrt_d or whiten), and a new head starts from the velocity
    of N(0, I) instead of 0. EDM's preconditioning (arXiv 2206.00364) for the linear path. Default: off, as in the
    authors' code."""
    layer: int | None = None
    """Layer whose output the head reads, from 1, as in Hugging Face's `hidden_states`. It must be on the last pipeline
    stage. Default: the last layer, after the final norm."""
    ema: Literal["none", "smooth", "teacher"] = "none"
    """EMA of the head's weights, from the end of phase A. 'none' (default): no EMA. 'smooth': the EMA is written back
    into the head after each step (on in the authors' YAML). 'teacher': the EMA weights supply the backbone's gradient,
    while the head trains on detached hidden states."""
    ema_decay: float = 0.999
    """EMA decay per step. Default 0.999, as in the authors' code; 0 does not average."""
    ema_order: Literal["after_step", "before_step"] = "after_step"
    """When 'smooth' writes back. 'after_step' (default): after the optimizer's step, so that the loss sees the EMA.
    'before_step': before it, as in the authors' code, so that the loss sees the EMA plus one whole step."""
    fault_phase_a_lost: bool = False
    """Reproduces a fault of the authors' code: the EMA starts from the head's initial weights instead of those that
    phase A has trained, so 'before_step' overwrites the trained head at the first joint step. Default: off."""
    target_dim: int | None = None
    """Dimension of the sentence embeddings. Default: that of the target store."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0:
            raise ValueError(
                f"`width` = {self.width} and `depth` = {self.depth}: "
                "the width must be at least 1 and the depth at least 0"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` = {self.ema_decay}: choose at least 0 and below 1")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"`layer` = {self.layer}: layers count from 1")
        if self.ema_order == "before_step" and self.ema == "teacher":
            raise ValueError("`ema_order` = before_step is for `ema` = smooth: a teacher is not written back")
        if self.fault_phase_a_lost and not (self.ema == "smooth" and self.stores_ema):
            raise ValueError("`fault_phase_a_lost` needs `ema` = smooth and `ema_order` = before_step")

    @property
    def stores_ema(self) -> bool:
        """Whether the head keeps its EMA beside its weights."""
        return self.ema == "teacher" or (self.ema == "smooth" and self.ema_order == "before_step")


@dataclass(frozen=True)
class FlowHeadPlan:
    """Everything needed to build a head.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.FlowHeadPlan(sfr.FlowHeadOptions(), dim=384).horizons
        1
    """

    options: FlowHeadOptions
    """Architecture and EMA."""
    dim: int
    """Dimension D of the target embeddings."""
    horizons: int = 1
    """Number of futures per anchor. If there are several, the head learns an embedding of each horizon."""
    has_network: bool = True
    """Whether there is a velocity network; sfr_loss = cka has none."""
    gate_bins: int = 1
    """Bins of t of the gradient gate."""
    clipped_apart: bool = True
    """Whether the head's gradient is excluded from the norm that clips the backbone."""
    weight: float = 1.0
    """Initial value of the adaptive weight."""
    seed: int = 1234
    """Seed of the initial weights."""
    fresh: bool = False
    """Whether the checkpoint to load may lack the head; the head then keeps its initial weights."""
    statistics: tuple[np.ndarray, np.ndarray] | None = None
    """Mean and standard deviation of the targets, [D] each."""


class FlowHead(MegatronModule):
    """The velocity network, its EMA if options.stores_ema, and the state of the auxiliary loss.

    Matrix products run in the dtype of the hidden states. EMA and state stay fp32 when the model is cast.

    Args:
        config: of the model; the head reads the hidden size and whether the model uses sequence parallelism.
        plan: the head's options, and the dimension D of the embeddings.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> from megatron.core.transformer import TransformerConfig
        >>> config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, cuda_graph_modules=[])
        >>> head = sfr.FlowHead(config, sfr.FlowHeadPlan(sfr.FlowHeadOptions(width=16), dim=4))
        >>> x_t, t, h = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 1), torch.zeros(2, 3, 1, 8)
        >>> head(x_t, t, h, torch.zeros(2, 3, dtype=torch.int64)).shape  # velocities [B, A, K, D]
        torch.Size([2, 3, 5, 4])
    """

    def __init__(self, config: TransformerConfig, plan: FlowHeadPlan) -> None:
        super().__init__(config)
        options = plan.options
        self.dim, self.fresh, self.decay = plan.dim, plan.fresh, options.ema_decay
        self.precondition = options.precondition
        self.net: nn.Module | None = None
        self.ema: nn.Module | None = None
        if plan.has_network:
            device = torch.get_default_device()
            with torch.device("meta"):  # no initialization here: it would advance the backbone's random stream
                net = VELOCITIES[options.architecture](
                    *(plan.dim, config.hidden_size, options.width, options.depth),
                    *(plan.horizons, options.time_scale),
                )
            net.to_empty(device=device)
            net.initialize(torch.Generator().manual_seed(plan.seed))
            for p in net.parameters():  # under sequence parallelism each rank has other anchors: sum the gradients
                p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            if plan.clipped_apart:
                _keep_apart(net)
            self.net = net
            if options.stores_ema:
                self.ema = copy.deepcopy(net).requires_grad_(False)
        self.state = FlowState(plan.weight, plan.dim, plan.gate_bins)
        if plan.statistics is not None:
            for buffer, value in zip((self.state.target_mean, self.state.target_std), plan.statistics, strict=True):
                buffer.copy_(torch.from_numpy(value))
        self.register_load_state_dict_pre_hook(_keep_fresh)
        self.register_load_state_dict_post_hook(_loaded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowHead":
        def keep_precision(x: Tensor) -> Tensor:  # Float16Module casts all parameters and buffers
            moved = fn(x)
            return x.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        for child in self.children():
            child._apply(fn if child is self.net else keep_precision)
        return self

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor, horizon_BA: Tensor, averaged: bool = False) -> Tensor:
        """Velocity [B, A, K, D] from x_t [B, A, K, D], t [B, A, K, 1] in [0, 1] and h [B, A, 1, H].

        Args:
            horizon_BA: index of the horizon, int64.
            averaged: whether to use the EMA of the weights.
        Raises:
            ValueError: x_t or h has another size than the head.
        """
        if (x_t.shape[-1], h.shape[-1]) != (self.dim, self.config.hidden_size):
            raise ValueError(
                f"the flow head is for embeddings of {self.dim} dimensions and hidden states of "
                f"{self.config.hidden_size}, not of {x_t.shape[-1]} and {h.shape[-1]}"
            )
        net = self.ema if averaged else self.net
        assert net is not None
        with torch.autocast(h.device.type, h.dtype, enabled=h.dtype in (torch.bfloat16, torch.float16)):
            if not self.precondition:
                return net(x_t, t, h, horizon_BA)
            scale = (t.square() + (1 - t).square()).rsqrt()
            return (2 * t - 1) * scale.square() * x_t + scale * net(scale * x_t, t, h, horizon_BA)

    @torch.no_grad()
    def average(self, first: bool) -> None:
        """Updates the EMA; the first update copies the weights."""
        assert self.net is not None
        assert self.ema is not None
        for p, mean in zip(self.net.parameters(), self.ema.parameters(), strict=True):
            mean.lerp_(p.to(mean.dtype), 1.0 if first else 1 - self.decay)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Upstream's; empty while the head is fresh, so that a checkpoint without a head can be loaded."""
        return {} if self.fresh else super().sharded_state_dict(prefix, sharded_offsets, metadata)


def _keep_apart(net: nn.Module) -> None:
    """Marks the head's parameters so that upstream treats the backbone exactly as it does without a head.

    Upstream's distributed optimizer starts a new bucket after a parameter marked `shared_embedding`. Buckets fill from
    the last parameter, so marking the head's first one keeps the backbone's buckets, and with them its shards and the
    rounding of its gradient norm, as they are without a head.
    """
    parameters = list(net.parameters())
    for p in parameters:
        p.grad_norm_group = GRADIENT_NORM_GROUP  # type: ignore[attr-defined]
    parameters[0].shared_embedding = True  # type: ignore[attr-defined]


def _keep_fresh(head: FlowHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load pre-hook: adds a fresh head's own values for the entries that the checkpoint lacks."""
    if head.fresh:
        state.update({prefix + name: value.detach() for name, value in head.state_dict().items()})


def _loaded(head: FlowHead, _: Mapping[str, Any]) -> None:
    """Load post-hook: from now on the head is saved and loaded like any other module."""
    head.fresh = False
