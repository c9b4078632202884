"""Modes of the real replies to a prompt: which of them a model reaches, and how much of what it says reaches one.

A mode is a cluster of real replies by their embeddings (evaluation/scores/clusters.py); nothing else is known of real
text.
"""

import numpy as np

from megatron_sfr.evaluation.scores.clusters import clusters

THRESHOLD = 0.7  # cosine from which two replies count as the same; a convention: compare at one threshold


def mode_coverage(vectors: np.ndarray, references: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Share of the modes of the real replies [m, dim] that at least one text [n, dim] hits; NaN without either.

    A text hits a mode where its cosine to one of the mode's replies is at least the threshold. The share rises with n:
    compare equal numbers of texts.
    """
    if not len(vectors) or not len(references):
        return float("nan")
    label = clusters(references, threshold)
    reached = (references @ vectors.T >= threshold).any(axis=1)
    return len(set(label[reached])) / len(set(label))
