"""Mean and standard deviation of each dimension of embeddings, of one store or several, for whitening.

Shapes: D dimension of the embeddings. Blocks and stores are combined in float64 by
mean = sum_i n_i mean_i / n and std^2 = sum_i n_i (std_i^2 + (mean_i - mean)^2) / n (Chan, Golub and LeVeque, 1983),
which does not subtract large sums from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and population standard deviation [D] of `rows` embeddings, float64."""

    rows: int
    mean: np.ndarray
    std: np.ndarray


class HasStatistics(Protocol):
    """What is needed of a store to combine it with others."""

    @property
    def mean(self) -> np.ndarray: ...
    @property
    def std(self) -> np.ndarray: ...
    def __len__(self) -> int: ...


def statistics_of(vectors: np.ndarray, block_rows: int = BLOCK_ROWS) -> Statistics:
    """Statistics of vectors [n, D], n >= 1, of any float dtype. Reads `block_rows` at a time."""
    total = None
    for first in range(0, len(vectors), block_rows):
        block = vectors[first : first + block_rows].astype(np.float64)
        new = Statistics(len(block), block.mean(axis=0), block.std(axis=0))
        total = new if total is None else pooled([total, new])
    assert total is not None, "a store is not empty"
    return total


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of the embeddings of all parts together."""
    rows = np.array([part.rows for part in parts], np.float64)[:, None]
    means, stds = np.stack([part.mean for part in parts]), np.stack([part.std for part in parts])
    share = rows / rows.sum()
    mean = (share * means).sum(axis=0)
    variance = (share * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return Statistics(int(rows.sum()), mean, np.sqrt(variance))


def pooled_statistics(stores: Iterable[HasStatistics]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 [D] each, as if all embeddings were in one store."""
    parts = [Statistics(len(s), s.mean.astype(np.float64), s.std.astype(np.float64)) for s in stores]
    dims = sorted({len(part.mean) for part in parts})
    if len(dims) != 1:
        raise ValueError(f"target stores of dimensions {dims} cannot be combined; embed all data with one encoder")
    total = pooled(parts)
    return total.mean.astype(np.float32), total.std.astype(np.float32)
