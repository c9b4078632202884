"""How often two replies to one prompt say the same: collisions, distinct classes, semantic entropy, distance to real.

Vectors are unit vectors of a sentence encoder. Two replies have the same meaning if their cosine is at least the
threshold: a stand-in for the trained classifiers that the papers use.
"""

import numpy as np

from megatron_sfr.evaluation.scores.embeddings import THRESHOLD, clusters

PATIENCE = 0.8  # NoveltyBench's: the probability that a user asks for one more reply


def collision_rate(vectors: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Share of pairs of texts [n, dim] with the same meaning. Unbiased for any n >= 2; NaN below."""
    n = len(vectors)
    if n < 2:
        return float("nan")
    same = int((vectors @ vectors.T >= threshold)[np.triu_indices(n, 1)].sum())
    return same / (n * (n - 1) / 2)


def distinct_k(vectors: np.ndarray, threshold: float = THRESHOLD) -> float:
    """NoveltyBench's distinct_k (Zhang et al., arXiv 2504.05228): classes among k texts [k, dim]. NaN without texts."""
    return float(len(set(novelty_classes(vectors, threshold)))) if len(vectors) else float("nan")


def novelty_classes(vectors: np.ndarray, threshold: float = THRESHOLD) -> list[int]:
    """The class of each text, in order: that of the nearest earlier class whose first text has the same meaning.

    NoveltyBench compares with a random member of a class; the first one makes the result reproducible.
    """
    firsts: list[int] = []
    label = []
    for i, vector in enumerate(vectors):
        cosines = vectors[firsts] @ vector if firsts else np.zeros(0)
        if cosines.size and cosines.max() >= threshold:
            label.append(int(cosines.argmax()))
        else:
            label.append(len(firsts))
            firsts.append(i)
    return label


def utility_k(classes: list[int], utilities: list[float], patience: float = PATIENCE) -> float:
    """NoveltyBench's utility_k = (1 - p) / (1 - p^k) sum_i p^(i-1) u_i [class i is new]; NaN without texts.

    A user sees the replies in order, asks for one more with probability p, and gains nothing from a class seen before.
    """
    k = len(classes)
    if not k:
        return float("nan")
    new = [label not in classes[:i] for i, label in enumerate(classes)]
    gains = (patience**i * u for i, (u, first) in enumerate(zip(utilities, new, strict=True)) if first)
    return sum(gains) * (1 - patience) / (1 - patience**k)


def semantic_entropy(vectors: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Entropy in nats of the meanings of n texts [n, dim], with a correction for meanings that were not sampled.

    Meanings are connected components (Kuhn et al., arXiv 2302.09664, uses entailment). Chao and Shen (2003): with
    sample coverage C = 1 - f_1 / n, f_1 the meanings seen once, and q_j = C n_j / n,
    H = -sum_j q_j ln q_j / (1 - (1 - q_j)^n).
    If every meaning was seen once, C is 1 / n instead of 0. NaN without texts.
    """
    n = len(vectors)
    if not n:
        return float("nan")
    counts = np.unique(clusters(vectors, threshold), return_counts=True)[1]
    once = int((counts == 1).sum())
    coverage = 1 - (once if once < n else n - 1) / n
    q = coverage * counts / n
    return float(-np.sum(q * np.log(q) / (1 - (1 - q) ** n)))


def squared_mmd(vectors: np.ndarray, references: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of texts [n, dim] and real replies [m, dim]; NaN for n or m < 2.

    Gretton et al. (JMLR 2012), kernel exp(-|x - y|^2 / 2). 0 in expectation if both have the same distribution,
    so single values may be negative.
    """
    n, m = len(vectors), len(references)
    if n < 2 or m < 2:
        return float("nan")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(-(1 - x.astype(np.float64) @ y.T.astype(np.float64)))  # |x - y|^2 = 2 - 2 cos

    xx, yy = kernel(vectors, vectors), kernel(references, references)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(vectors, references).mean())
