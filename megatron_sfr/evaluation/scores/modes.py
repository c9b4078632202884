"""Coverage of the modes of the real replies to a prompt.

A mode is a cluster of real replies by their embeddings (evaluation/scores/clusters.py).
"""

import numpy as np

from megatron_sfr.evaluation.scores.clusters import clusters

THRESHOLD = 0.7  # smallest cosine of replies in one mode; a convention: compare at equal thresholds


def mode_coverage(vectors: np.ndarray, references: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Share of the modes of the real replies [m, dim] that at least one text [n, dim] hits; NaN without either.

    A text hits a mode if its cosine to one of the mode's replies is at least the threshold. The share rises with n, so
    compare equal numbers of texts.
    """
    if not len(vectors) or not len(references):
        return float("nan")
    label = clusters(references, threshold)
    reached = (references @ vectors.T >= threshold).any(axis=1)
    return len(set(label[reached])) / len(set(label))
