"""Similarity of replies within and across models: whether different models say the same (arXiv 2510.22954).

The paper calls it the "artificial hivemind": many models, one answer.
"""

import numpy as np


def similarity(vectors: np.ndarray, others: np.ndarray, *, paired: bool = True) -> float:
    """Mean cosine of unit vectors [n, dim] and others [m, dim]. NaN without a pair.

    paired: leave out pairs of the same index: a reply with itself, or replies that share their random numbers.
    """
    n, m = len(vectors), len(others)
    pairs = n * m - (min(n, m) if paired else 0)
    if not pairs:
        return float("nan")
    total = vectors.sum(axis=0, dtype=np.float64) @ others.sum(axis=0, dtype=np.float64)
    same = sum(float(a @ b) for a, b in zip(vectors, others, strict=False)) if paired else 0.0
    return float((total - same) / pairs)
