"""The scale at which sentence embeddings are targets of the flow. Letters: D dimension of the embedding."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST = 0.01  # a dimension's spread counts as at least this share of 1 / sqrt(D), the spread of a unit vector


@dataclass(frozen=True)
class TargetOptions:
    """What the flow is trained to reach."""

    sfr_target_scale: Literal["l2", "sqrt_d", "whiten"] = "sqrt_d"
    """'l2': unit-length targets as the authors' code has them; 'sqrt_d': times sqrt(D), so that noise and target have
    the same scale in each dimension; 'whiten': less the mean and over the standard deviation of each dimension."""
    sfr_whiten: Literal["store", "ema"] = "store"
    """Statistics for sfr_target_scale = whiten: those of the target store, or a running average over batches that
    starts at sqrt_d. Both are in the checkpoint."""
    sfr_whiten_decay: float = 0.99
    """Share of the running average that a step keeps, for sfr_whiten = ema."""

    def __post_init__(self) -> None:
        if not 0 <= self.sfr_whiten_decay < 1:
            raise ValueError(f"sfr_whiten_decay = {self.sfr_whiten_decay}: choose 0 up to, but not, 1")


def scale_targets(x_1: Tensor, mean_D: Tensor, std_D: Tensor, options: TargetOptions) -> Tensor:
    """Unit-length embeddings [..., D] to the scale that the flow is trained at; fp32. Statistics only for whiten."""
    x_1, root = x_1.float(), x_1.shape[-1] ** 0.5
    if options.sfr_target_scale == "whiten":
        return (x_1 - mean_D) / std_D.clamp(min=SMALLEST / root)
    return x_1 * root if options.sfr_target_scale == "sqrt_d" else x_1


def unit_targets(x: Tensor, mean_D: Tensor, std_D: Tensor, options: TargetOptions) -> Tensor:
    """The inverse of `scale_targets`, up to the length: points [..., D] at the flow's scale as embeddings."""
    if options.sfr_target_scale == "whiten":
        return x * std_D.clamp(min=SMALLEST / x.shape[-1] ** 0.5) + mean_D
    return x


def batch_moments(x_1: Tensor, weight: Tensor) -> Tensor:
    """[sum w, sum w x (D), sum w x^2 (D)] over embeddings [..., D] with weights [...]: float64 [1 + 2 D]."""
    x, w = x_1.double().flatten(0, -2), weight.double().flatten()
    return torch.cat([w.sum()[None], w @ x, w @ x.square()])


def running_statistics(moments: Tensor, mean_D: Tensor, std_D: Tensor, seen: Tensor, decay: float) -> tuple:
    """(mean, std, seen) after one more batch: its own for the first one, then decay old + (1 - decay) new, of mean and
    variance. seen counts the batches; a batch without weight changes nothing."""
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
