"""Scores of the embeddings of texts, which are unit vectors: spread, Vendi score, similarity, clusters, modes."""

import numpy as np

THRESHOLD = 0.7
"""Smallest cosine of replies in one mode; a convention: compare at equal thresholds."""


def spread(vectors: np.ndarray) -> np.ndarray:
    """Mean of 1 - cosine over pairs of unit vectors [..., n, dim]: float64 [...]; NaN for n < 2.

    Incoherence saturates it: nonsense is more spread than any set of real answers.
    """
    n = vectors.shape[-2]
    if n < 2:
        return np.full(vectors.shape[:-2], np.nan)
    total = np.square(vectors.sum(axis=-2, dtype=np.float64)).sum(axis=-1)
    own = np.square(vectors, dtype=np.float64).sum(axis=(-2, -1))
    return 1 - (total - own) / (n * (n - 1))


def vendi_score(vectors: np.ndarray) -> float:
    """exp(-sum_i l_i ln l_i) in [1, n], l_i the eigenvalues of K / n, K the cosines of n unit vectors [n, dim].

    The effective number of different texts (Friedman and Dieng, arXiv 2210.02410): 1 if all vectors are equal, n if all
    are orthogonal. Like the spread, it counts nonsense as diverse. NaN without texts.
    """
    n = len(vectors)
    if not n:
        return float("nan")
    x = vectors.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh((x @ x.T if n <= x.shape[1] else x.T @ x) / n)
    known = eigenvalues[eigenvalues > 0]
    return float(np.exp(-np.sum(known * np.log(known))))


def similarity(vectors: np.ndarray, others: np.ndarray, *, paired: bool = True) -> float:
    """Mean cosine of unit vectors [n, dim] and others [m, dim]. NaN without a pair.

    Across models it tells whether different models say the same, the "artificial hivemind" (arXiv 2510.22954).

    paired: leave out pairs of the same index: a reply with itself, or replies that share their random numbers.
    """
    n, m = len(vectors), len(others)
    pairs = n * m - (min(n, m) if paired else 0)
    if not pairs:
        return float("nan")
    total = vectors.sum(axis=0, dtype=np.float64) @ others.sum(axis=0, dtype=np.float64)
    same = sum(float(a @ b) for a, b in zip(vectors, others, strict=False)) if paired else 0.0
    return float((total - same) / pairs)


def clusters(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster of each unit vector [..., n, dim]: int [..., n], the index of the first vector of its cluster.

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


def mode_coverage(vectors: np.ndarray, references: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Share of the modes of the real replies [m, dim] that at least one text [n, dim] hits; NaN without either.

    A mode is a cluster of real replies to a prompt. A text hits a mode if its cosine to one of the mode's replies is at
    least the threshold. The share rises with n, so compare equal numbers of texts.
    """
    if not len(vectors) or not len(references):
        return float("nan")
    label = clusters(references, threshold)
    reached = (references @ vectors.T >= threshold).any(axis=1)
    return len(set(label[reached])) / len(set(label))
