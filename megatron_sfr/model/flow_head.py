"""The flow head: predicts the velocity of a future's embedding from its noised value, the time and the hidden state.

Replicated over tensor-parallel ranks, lives on the last pipeline stage only, and is dropped at inference.
Letters: B samples, A anchors, K noise draws, D dimension of the embedding, H of the hidden state.
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

GRADIENT_NORM_GROUP = "sfr_head"
"""Upstream's optimizer clips the parameters of such a group apart from all others (training/head_optimizer.py)."""


@dataclass(frozen=True)
class FlowHeadOptions:
    """The flow head."""

    sfr_head: Literal["mlp", "adaln"] = "mlp"
    """'mlp': x_t, t and h concatenated, as SFR's authors have it; 'adaln': t and h modulate the residual blocks, as in
    MAR (arXiv 2406.11838)."""
    sfr_head_width: int = 1024
    """Width of the head; the authors' 1024, which MAR has too."""
    sfr_head_depth: int = 1
    """Residual blocks of the head; the authors' three layers are one block, MAR has 3."""
    sfr_time_scale: float = 1000.0
    """What t in [0, 1] is multiplied by before its sines and cosines of base 10000: at the authors' 1 near times look
    alike."""
    sfr_layer: int | None = None
    """Layer, from 1, whose output the head reads, as HF counts `hidden_states`; it must live on the last stage. By
    default the last one, after the final norm."""
    sfr_ema: Literal["none", "smooth", "teacher"] = "none"
    """Running average of the head from the end of phase A on. 'smooth': written back into the head after each step (on
    in the authors' YAML); 'teacher': it supplies the backbone's gradient, while the head learns on detached states."""
    sfr_ema_decay: float = 0.999
    """Share of the average that a step keeps; the authors' 0.999. 0 is no averaging."""
    sfr_target_dim: int | None = None
    """Dimension of the sentence embeddings; by default that of the target store."""

    def __post_init__(self) -> None:
        if self.sfr_head_width < 1 or self.sfr_head_depth < 0:
            raise ValueError(f"a head of width {self.sfr_head_width} and depth {self.sfr_head_depth} cannot be built")
        if not 0 <= self.sfr_ema_decay < 1:
            raise ValueError(f"sfr_ema_decay = {self.sfr_ema_decay}: choose 0 up to, but not, 1")
        if self.sfr_layer is not None and self.sfr_layer < 1:
            raise ValueError(f"sfr_layer = {self.sfr_layer}: layers count from 1")


@dataclass(frozen=True)
class FlowHeadPlan:
    """Everything that a head is built from."""

    options: FlowHeadOptions
    dim: int
    """D."""
    horizons: int = 1
    """Futures that an anchor has; with several the head learns an embedding of each."""
    has_network: bool = True
    """Whether there is a velocity to learn at all: cka has none."""
    gate_bins: int = 1
    clipped_apart: bool = True
    """Whether the head's gradient is kept out of the norm that clips the backbone."""
    weight: float = 1.0
    """Where the steered weight of the loss starts."""
    seed: int = 1234
    """Of the initial weights."""
    fresh: bool = False
    """Whether the checkpoint to be loaded may lack the head: the one made here then stays."""
    statistics: tuple[np.ndarray, np.ndarray] | None = None
    """Mean and standard deviation of the targets, [D] each."""


class FlowHead(MegatronModule):
    """The velocity network, its running average where that teaches, and the state of the term.

    The products run in the dtype of the hidden states; average and state are fp32 whatever the model becomes.
    """

    def __init__(self, config: TransformerConfig, plan: FlowHeadPlan) -> None:
        super().__init__(config)
        options = plan.options
        self.dim, self.fresh, self.decay = plan.dim, plan.fresh, options.sfr_ema_decay
        self.net: nn.Module | None = None
        self.ema: nn.Module | None = None
        self.caught: Tensor | None = None
        if plan.has_network:
            device = torch.get_default_device()
            with torch.device("meta"):  # made without numbers, so that the backbone's random stream is not touched
                net = VELOCITIES[options.sfr_head](
                    *(plan.dim, config.hidden_size, options.sfr_head_width, options.sfr_head_depth),
                    *(plan.horizons, options.sfr_time_scale),
                )
            net.to_empty(device=device)
            net.initialise(torch.Generator().manual_seed(plan.seed))
            for p in net.parameters():  # under sequence parallelism each rank has anchors of its own: sum over them
                p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            if plan.clipped_apart:
                _keep_apart(net)
            self.net = net
            if options.sfr_ema == "teacher":
                self.ema = copy.deepcopy(net).requires_grad_(False)
        self.state = FlowState(plan.weight, plan.dim, plan.gate_bins)
        if plan.statistics is not None:
            for buffer, value in zip((self.state.target_mean, self.state.target_std), plan.statistics, strict=True):
                buffer.copy_(torch.from_numpy(value))
        self.register_load_state_dict_pre_hook(_keep_fresh)
        self.register_load_state_dict_post_hook(_loaded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowHead":
        def keep_precision(x: Tensor) -> Tensor:  # Float16Module casts every parameter and buffer of the model
            moved = fn(x)
            return x.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        for child in self.children():
            child._apply(fn if child is self.net else keep_precision)
        return self

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor, horizon_BA: Tensor, averaged: bool = False) -> Tensor:
        """Velocity [B, A, K, D] from x_t [B, A, K, D], t [B, A, K, 1] in [0, 1] and h [B, A, 1, H].

        Args: horizon_BA: which future, int64. averaged: answer with the running average of the weights.
        """
        net = self.ema if averaged else self.net
        assert net is not None
        with torch.autocast(h.device.type, h.dtype, enabled=h.dtype in (torch.bfloat16, torch.float16)):
            return net(x_t, t, h, horizon_BA)

    @torch.no_grad()
    def average(self, first: bool) -> None:
        """One step of the running average, which starts as the weights stand (first)."""
        assert self.net is not None
        assert self.ema is not None
        for p, mean in zip(self.net.parameters(), self.ema.parameters(), strict=True):
            mean.lerp_(p.to(mean.dtype), 1.0 if first else 1 - self.decay)

    def catch(self, _layer: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        """Forward hook of the layer that the head reads, where it is not the last one."""
        self.caught = output[0]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As upstream's; empty while the head is fresh, so that a checkpoint without a head can be read."""
        return {} if self.fresh else super().sharded_state_dict(prefix, sharded_offsets, metadata)


def _keep_apart(net: nn.Module) -> None:
    """Marks the network's parameters, so that upstream treats the backbone exactly as it would without them.

    Upstream's distributed optimizer starts a new bucket after a parameter marked as `shared_embedding`. On the first
    parameter (buckets fill from the last) that leaves the backbone's buckets, and hence its shards and the rounding of
    its gradient norm, as they are without a head.
    """
    parameters = list(net.parameters())
    for p in parameters:
        p.grad_norm_group = GRADIENT_NORM_GROUP  # type: ignore[attr-defined]
    parameters[0].shared_embedding = True  # type: ignore[attr-defined]


def _keep_fresh(head: FlowHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a load: a fresh head stands in for the entries that were not read."""
    if head.fresh:
        state.update({prefix + name: value.detach() for name, value in head.state_dict().items()})


def _loaded(head: FlowHead, _: Mapping[str, Any]) -> None:
    """After a load the head is like any other module: it is saved, and must be there to be loaded."""
    head.fresh = False
