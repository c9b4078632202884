"""Dispersion and clusters of unit vectors. Batched, in NumPy."""

import numpy as np


def spread(vectors: np.ndarray) -> np.ndarray:
    """Mean of 1 - cosine over pairs of unit vectors [..., n, D]: float64 [...]; NaN for n < 2."""
    n = vectors.shape[-2]
    if n < 2:
        return np.full(vectors.shape[:-2], np.nan)
    total = np.square(vectors.sum(axis=-2, dtype=np.float64)).sum(axis=-1)
    own = np.square(vectors, dtype=np.float64).sum(axis=(-2, -1))
    return 1 - (total - own) / (n * (n - 1))


def clusters(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster of each unit vector [..., n, D]: int [..., n], the index of the first vector of its cluster.

    Clusters are the connected components of the graph with an edge between vectors of cosine >= threshold.
    """
    n = vectors.shape[-2]
    near = (vectors @ np.swapaxes(vectors, -1, -2) >= threshold) | np.eye(n, dtype=bool)
    label = np.broadcast_to(np.arange(n), vectors.shape[:-1])
    while True:  # each vector takes the smallest label among its neighbours until no label changes
        least = np.where(near, label[..., None, :], n).min(axis=-1, initial=n)
        if np.array_equal(least, label):
            return least
        label = least
