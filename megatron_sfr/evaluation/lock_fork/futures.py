"""Futures at a position: the flow head's samples of the embedding of the text to come, and the information in h.

Shapes: N positions, S samples per position, D embedding dimension, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.evaluation.lock_fork.token_statistics import Positions
from megatron_sfr.evaluation.scores.embeddings import clusters, spread
from megatron_sfr.flow.information import gaussian_velocity, relative_entropy
from megatron_sfr.flow.solver import Method, Velocity, integrate
from megatron_sfr.model.flow_head import FlowHead
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, scale_targets
from megatron_sfr.runtime.noise import normal

SAMPLE_STREAM, PATH_STREAM = 3, 4  # streams of the noise; training uses 0 and 1, text sampling 2
AT_ONCE = 64  # positions per batch


@dataclass(frozen=True)
class FutureOptions:
    """How futures are sampled and clustered."""

    samples: int = 16
    steps: int = 16
    method: Method = "heun"
    seed: int = 0
    horizon: int = 0
    near: float = 0.8
    """Smallest cosine of two futures in one cluster."""
    nodes: int = 16
    """Of the quadrature over time."""
    end: float = 0.95
    """Upper limit of the integral, below 1: see flow/information.py."""

    def __post_init__(self) -> None:
        if min(self.samples, self.steps, self.nodes) < 1 or self.horizon < 0 or not 0 < self.end < 1:
            raise ValueError("give samples, steps and nodes of at least 1, a horizon of at least 0 and end in (0, 1)")


@dataclass(frozen=True)
class Futures:
    """Futures of N positions."""

    dispersion: np.ndarray
    """Mean of 1 - cosine over pairs of samples; [N]."""
    clusters: np.ndarray
    """Number of clusters of the samples; [N]."""
    gain: np.ndarray
    """D(p(x_1 | h) || N(mean, std^2 of all targets)) in nats, up to t = end: the information in h about the future.
    Its mean over positions is I(h; x_1) plus D(targets || that Gaussian), which is the same for all positions; [N]."""
    vectors: np.ndarray
    """The samples as unit vectors, fp16 [N, S, D]."""
    groups: np.ndarray
    """The cluster of each sample, int [N, S]."""


@dataclass(frozen=True)
class Scale:
    """The target scale that the head was trained at, an affine map per dimension; mean and std [D] of unit targets."""

    mean_D: Tensor
    std_D: Tensor
    options: TargetOptions

    def marginal(self) -> Velocity:
        """The velocity of the Gaussian with the targets' mean and standard deviations, at the head's scale."""
        zero_D, slope_D = self._map()
        return gaussian_velocity(zero_D + self.mean_D * slope_D, self.std_D * slope_D)

    def to_unit(self, x: Tensor) -> Tensor:
        """Maps samples [..., D] at the head's scale to unit vectors."""
        zero_D, slope_D = self._map()
        return F.normalize((x - zero_D) / slope_D, dim=-1)

    def _map(self) -> tuple[Tensor, Tensor]:
        zero_D, one_D = (
            scale_targets(torch.full_like(self.mean_D, value), self.mean_D, self.std_D, self.options)
            for value in (0.0, 1.0)
        )
        return zero_D, one_D - zero_D


@torch.inference_mode()
def futures(head: FlowHead, hidden_NH: Tensor, where: Positions, scale: Scale, options: FutureOptions) -> Futures:
    """Samples and measures futures. The noise is keyed by (seed, sample, place), independent of other positions."""
    if head.net is None:
        raise ValueError("this run's head has no network (sfr_loss = cka) and cannot sample futures")
    if hidden_NH.shape[1] != head.config.hidden_size:
        raise ValueError(
            f"the flow head was trained with hidden size {head.config.hidden_size}, but the base model has "
            f"{hidden_NH.shape[1]}: give the head of this model"
        )
    parts = list(_parts(head, hidden_NH, where, scale, options))
    dispersion, number, gain, vectors, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Futures(dispersion, number, gain, vectors, groups)


def nearest(vectors: np.ndarray, store: TargetStore, rows_at_once: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """Index of the stored embedding nearest to each unit vector [M, D], and its cosine: [M] each."""
    best, cosine = np.zeros(len(vectors), int), np.full(len(vectors), -np.inf, np.float32)
    for start in range(0, len(store), rows_at_once):
        rows = store[np.arange(start, min(start + rows_at_once, len(store)))].astype(np.float32)
        cosines = vectors.astype(np.float32) @ rows.T
        at = cosines.argmax(axis=1)
        value = cosines[np.arange(len(cosines)), at]
        best, cosine = np.where(value > cosine, start + at, best), np.maximum(cosine, value)
    return best, cosine


def _parts(
    head: FlowHead, hidden_NH: Tensor, where: Positions, scale: Scale, options: FutureOptions
) -> Iterator[tuple[np.ndarray, ...]]:
    """The fields of Futures, AT_ONCE positions at a time."""
    marginal = scale.marginal()
    draw_S = torch.arange(options.samples)
    for start in range(0, len(hidden_NH), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        h = hidden_NH[part]
        velocity = _velocity(head, h, options.horizon)
        sample, place = (torch.from_numpy(x[part]).long()[:, None] for x in (where.sample, where.place))
        x_0, path = (
            normal(options.seed, sample, place, draw_S, head.dim, stream=stream)
            for stream in (SAMPLE_STREAM, PATH_STREAM)
        )
        x_1 = integrate(velocity, x_0, options.steps, options.method)
        gain = relative_entropy(velocity, marginal, x_1, path, nodes=options.nodes, end=options.end)
        vectors = scale.to_unit(x_1).numpy()
        groups = clusters(vectors, options.near)
        number = np.array([len(set(row)) for row in groups.tolist()])
        yield spread(vectors), number, gain.numpy(), vectors.astype(np.float16), groups


def _velocity(head: FlowHead, h_NH: Tensor, horizon: int) -> Velocity:
    """The head's velocity at hidden states h_NH, a function of x [N, S, D] and t [N, S, 1]."""
    h = h_NH[None, :, None]
    which = torch.full((1, len(h_NH)), horizon, dtype=torch.int64)
    return lambda x, t: head(x[None], t[None], h, which)[0].float()
