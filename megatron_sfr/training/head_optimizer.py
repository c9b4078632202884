"""The flow head in upstream's optimizer: its own gradient norm, clip threshold and learning rate.

Otherwise the head's gradient would be part of the norm that clips the backbone and shrink the backbone's update.
Upstream (megatron-core 0.19.2) clips the parameters of a registered `grad_norm_group` by the norm of that group, on any
layout. This module registers the head's group and replaces three upstream functions for the duration of a run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor

from megatron_sfr.model.flow_head import GRADIENT_NORM_GROUP
from megatron_sfr.option_names import named
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.replacements import Replacement, replaced, wrapper

OPTIMIZER, TRAINING = "megatron.core.optimizer.optimizer", "megatron.training.training"


@named("sfr_", lr_mult="sfr_head_lr_mult")
@dataclass(frozen=True)
class HeadOptimizerOptions:
    """How the optimizer treats the flow head."""

    clip_grad: float | None = None
    """Gradient norm to which the head is clipped, separately from the backbone; 0 disables clipping. Default:
    clip_grad."""
    lr_mult: float = 1.0
    """Multiplies lr and min_lr for the head. Default 1."""

    def __post_init__(self) -> None:
        if self.clip_grad is not None and self.clip_grad < 0:
            raise ValueError(f"`clip_grad` is {self.clip_grad}; give a norm above 0, or 0 for no clipping")
        if self.lr_mult <= 0:
            raise ValueError(f"`lr_mult` is {self.lr_mult}; give a factor above 0")


def clipping(options: HeadOptimizerOptions) -> tuple[Replacement, ...]:
    """The names of Megatron Core that are replaced so that it clips the head separately, in any training loop."""
    return (
        Replacement(
            OPTIMIZER,
            "SEPARATE_GRAD_NORM_GROUPS",
            wrapper(lambda groups: (*groups, GRADIENT_NORM_GROUP)),
            "refuses the parameters of a gradient norm group that it does not know",
        ),
        Replacement(
            OPTIMIZER,
            "clip_grad_by_total_norm_fp32",
            wrapper(lambda clip: _clip(clip, options.clip_grad)),
            "clips every gradient norm group to the same threshold",
            ("parameters", "max_norm", "total_norm", "use_decoupled_grad"),
        ),
    )


def separate_clipping(clip_grad: float | None = None) -> AbstractContextManager[None]:
    """A context in which the optimizer of Megatron Core clips the flow head by its own gradient norm.

    Optimizer steps of a model with a head have to run inside it, unless schedule.weight_on is loss. Otherwise Megatron
    refuses the head's parameters: "Unknown grad_norm_group 'sfr_head'". An optimizer of torch does not need it.

    Args:
        clip_grad: gradient norm to which the head is clipped; 0 disables clipping. Default: the optimizer's clip_grad.
    Returns:
        The context. Leaving it restores Megatron Core.
    Raises:
        ValueError: clip_grad is negative.
    Example:
        >>> import megatron_sfr as sfr
        >>> with sfr.separate_clipping(1.0):
        ...     pass  # the training loop
    """
    return replaced(clipping(HeadOptimizerOptions(clip_grad)))


def replacements(options: HeadOptimizerOptions) -> tuple[Replacement, ...]:
    """The names that are replaced so that Megatron's training loop applies all `options` to the head."""
    return (
        *clipping(options),
        Replacement(
            TRAINING,
            "get_standard_config_overrides",
            wrapper(lambda make: _overrides(make, options.lr_mult)),
            "takes learning rates of single parameters from here only",
            ("config",),
        ),
        Replacement(
            TRAINING,
            "train_step",
            wrapper(_report_norm),
            "does not log the gradient norm of a separate group",
            ("forward_step_func", "data_iterator", "model", "optimizer"),
        ),
    )


def _clip(original: Callable[..., None], threshold: float | None) -> Callable[..., None]:
    """Upstream's clipping of a list of parameters, with a separate threshold for the head."""

    def clip(parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        if threshold is not None and getattr(parameters[0], "grad_norm_group", None) == GRADIENT_NORM_GROUP:
            max_norm = threshold
            if threshold == 0:
                return
        original(parameters, max_norm, total_norm, use_decoupled_grad=use_decoupled_grad)

    return clip


def _overrides(original: Callable[[Any], dict], factor: float) -> Callable[[Any], dict]:
    """Upstream's per-parameter overrides, plus the head's learning rate."""

    def overrides(config: Any) -> dict:
        if factor == 1:
            return original(config)
        rates = {"max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0)}
        return {**original(config), ParamKey(name="*flow_head.*"): rates}

    return overrides


def _report_norm(original: Callable[..., tuple]) -> Callable[..., tuple]:
    """Upstream's training step, which also reports the head's gradient norm before clipping."""

    def train_step(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> tuple:
        losses, *rest = original(step, data, model, optimizer, *args, **kwargs)
        norm: Tensor | float | None = getattr(optimizer, "grad_norms_by_group", {}).get(GRADIENT_NORM_GROUP)
        if losses and norm is not None:
            norm = torch.as_tensor(norm, dtype=torch.float32, device=device()).view(())
            losses = {**losses, "sfr head grad-norm": norm}
        return losses, *rest

    return train_step
