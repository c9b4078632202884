"""How different texts are: distinct-n, self-BLEU, cross-style BLEU, embedding spread, Vendi score. Pure functions.

None of them means anything without a measure of quality beside it: noise is diverse.
"""

import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np

from megatron_sfr.flow.clusters import spread


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of words in the texts, in (0, 1] (Li et al., NAACL 2016).

    It falls with the number and length of texts: compare equal numbers. NaN where no text has n words.
    """
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def bleu(hypothesis: str, reference: str, n: int) -> float:
    """Sentence BLEU-n in [0, 1] by sacrebleu: 13a tokens, exponential smoothing, effective order for short texts."""
    return float(_bleu(n).sentence_score(hypothesis, [reference]).score) / 100


@cache
def _bleu(n: int) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(max_ngram_order=n, effective_order=True)


def self_bleu(texts: Sequence[str], n: int, *, pairs: int, seed: int) -> float:
    """Mean BLEU-n of one text against another, over ordered pairs of texts for one prompt; 1: all are the same.

    At most `pairs` pairs, drawn by seed: all pairs are quadratic in the number of texts. NaN for fewer than two texts.
    """
    chosen = _draw(list(permutations(range(len(texts)), 2)), pairs, seed)
    return _mean([bleu(texts[i], texts[j], n) for i, j in chosen])


def cross_style_bleu(texts: Mapping[str, Sequence[str]], n: int, *, pairs: int, seed: int) -> float:
    """CS-SB-n: mean BLEU-n of a reply of persona a against one of persona b, over ordered pairs (a, b), on one prompt.

    Each of at most `pairs` comparisons takes another ordered pair of personas as long as there is one, and a text of
    either drawn by seed. NaN for fewer than two personas.
    """
    rng = random.Random(seed)
    styles = list(permutations([persona for persona in sorted(texts) if texts[persona]], 2))
    rng.shuffle(styles)
    chosen = [styles[i % len(styles)] for i in range(pairs)] if styles else []
    return _mean([bleu(rng.choice(texts[a]), rng.choice(texts[b]), n) for a, b in chosen])


def embedding_spread(vectors: np.ndarray) -> float:
    """Mean 1 - cosine over pairs of unit vectors [texts, dim]; NaN for fewer than two.

    Incoherence saturates it: nonsense is more spread than any set of real answers.
    """
    return float(spread(vectors))


def vendi_score(vectors: np.ndarray) -> float:
    """exp(-sum_i l_i ln l_i) in [1, n], l_i the eigenvalues of K / n, K the cosines of n unit vectors [n, dim].

    The effective number of different texts (Friedman and Dieng, arXiv 2210.02410): 1 where all are alike, n where all
    are at right angles. Like the spread it counts nonsense as diverse. NaN for none.
    """
    n = len(vectors)
    if not n:
        return float("nan")
    x = vectors.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh((x @ x.T if n <= x.shape[1] else x.T @ x) / n)
    known = eigenvalues[eigenvalues > 0]
    return float(np.exp(-np.sum(known * np.log(known))))


def _draw[T](items: list[T], count: int, seed: int) -> list[T]:
    return items if len(items) <= count else random.Random(seed).sample(items, count)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
