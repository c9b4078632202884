"""How unit vectors lie: their spread, and the groups of those that are near each other. Batched, in NumPy."""

import numpy as np


def spread(vectors: np.ndarray) -> np.ndarray:
    """Mean 1 - cosine over pairs of unit vectors [..., n, D]: [...] in float64; NaN for n < 2."""
    n = vectors.shape[-2]
    if n < 2:
        return np.full(vectors.shape[:-2], np.nan)
    total = np.square(vectors.sum(axis=-2, dtype=np.float64)).sum(axis=-1)
    own = np.square(vectors, dtype=np.float64).sum(axis=(-2, -1))
    return 1 - (total - own) / (n * (n - 1))


def clusters(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster of each unit vector [..., n, D]: int [..., n], the place of the first vector of its cluster.

    Clusters are connected components of the graph whose edges are cosines >= threshold.
    """
    n = vectors.shape[-2]
    near = (vectors @ np.swapaxes(vectors, -1, -2) >= threshold) | np.eye(n, dtype=bool)
    label = np.broadcast_to(np.arange(n), vectors.shape[:-1])
    while True:  # each takes the least label among its neighbours until none changes
        least = np.where(near, label[..., None, :], n).min(axis=-1, initial=n)
        if np.array_equal(least, label):
            return least
        label = least
