"""Scaling of sentence embeddings to targets of the flow. Shapes: D embedding dimension."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sfr.option_names import named

SMALLEST = 0.01  # lower bound on a dimension's standard deviation, in units of 1 / sqrt(D), that of a unit vector


@named("sfr_", scale="sfr_target_scale")
@dataclass(frozen=True)
class TargetOptions:
    """The targets of the flow.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.TargetOptions(scale="whiten", whiten="ema").whiten_decay
        0.99
    """

    scale: Literal["l2", "sqrt_d", "whiten"] = "sqrt_d"
    """Scale of the targets. 'l2': unit length, as in the authors' code. 'sqrt_d' (default): unit length times sqrt(D),
    so that noise and targets have the same scale in each dimension. 'whiten': subtract the mean of each dimension and
    divide by its standard deviation."""
    whiten: Literal["store", "ema"] = "store"
    """Statistics for sfr_target_scale = whiten. 'store' (default): those of the target store. 'ema': an EMA over
    batches that starts at the scale of sqrt_d. Checkpoints contain either."""
    whiten_decay: float = 0.99
    """EMA decay per step, for sfr_whiten = ema. Default 0.99."""

    def __post_init__(self) -> None:
        if not 0 <= self.whiten_decay < 1:
            raise ValueError(f"`whiten_decay` = {self.whiten_decay}: choose at least 0 and below 1")


def scale_targets(x_1: Tensor, mean_D: Tensor, std_D: Tensor, options: TargetOptions) -> Tensor:
    """Scales unit-length embeddings [..., D] to targets of the flow, fp32. Only 'whiten' uses the statistics."""
    x_1, root = x_1.float(), x_1.shape[-1] ** 0.5
    if options.scale == "whiten":
        return (x_1 - mean_D) / std_D.clamp(min=SMALLEST / root)
    return x_1 * root if options.scale == "sqrt_d" else x_1


def unit_targets(x: Tensor, mean_D: Tensor, std_D: Tensor, options: TargetOptions) -> Tensor:
    """The inverse of `scale_targets` up to length: maps points [..., D] at the flow's scale to embeddings."""
    if options.scale == "whiten":
        return x * std_D.clamp(min=SMALLEST / x.shape[-1] ** 0.5) + mean_D
    return x


def batch_moments(x_1: Tensor, weight: Tensor) -> Tensor:
    """[sum w, sum w x (D), sum w x^2 (D)] over embeddings [..., D] with weights [...]: float64 [1 + 2 D]."""
    x, w = x_1.double().flatten(0, -2), weight.double().flatten()
    return torch.cat([w.sum()[None], w @ x, w @ x.square()])


def running_statistics(
    moments: Tensor, mean_D: Tensor, std_D: Tensor, seen: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, seen) after one more batch: an EMA of mean and variance, decay old + (1 - decay) new.

    The first batch replaces the initial values. `seen` counts batches; a batch of weight 0 changes nothing.
    """
    w, x, square = moments[0], *moments[1:].chunk(2)
    mean = x / w.clamp(min=1e-20)
    variance = (square / w.clamp(min=1e-20) - mean.square()).clamp(min=0)
    keep = torch.where(seen > 0, decay, 0.0)
    mean = keep * mean_D + (1 - keep) * mean
    std = (keep * std_D.square() + (1 - keep) * variance).sqrt()
    some = w > 0
    return (
        torch.where(some, mean, mean_D).to(mean_D.dtype),
        torch.where(some, std, std_D).to(std_D.dtype),
        seen + some.to(seen.dtype),
    )
