"""Modes of the real replies to a prompt: which of them a model reaches, and how much of what it says reaches one.

A mode is a cluster of real replies by their embeddings; nothing else is known of real text.
"""

import numpy as np

THRESHOLD = 0.7  # cosine from which two replies count as the same; a convention: compare at one threshold


def modes(references: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """The mode of each real reply, int [m]: connected components of unit vectors [m, dim] with cosine >= threshold."""
    near = references @ references.T >= threshold
    label = np.arange(len(references))
    while True:  # each takes the least label among its neighbours until none changes
        least = np.where(near | np.eye(len(label), dtype=bool), label, len(label)).min(axis=1, initial=len(label))
        if np.array_equal(least, label):
            return np.unique(label, return_inverse=True)[1]
        label = least


def mode_coverage(vectors: np.ndarray, references: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Share of the modes of the real replies [m, dim] that at least one text [n, dim] hits; NaN without either.

    A text hits a mode where its cosine to one of the mode's replies is at least the threshold. The share rises with n:
    compare equal numbers of texts.
    """
    if not len(vectors) or not len(references):
        return float("nan")
    label = modes(references, threshold)
    reached = (references @ vectors.T >= threshold).any(axis=1)
    return len(set(label[reached])) / len(set(label))
