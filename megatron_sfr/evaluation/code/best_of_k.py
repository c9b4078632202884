"""Using k of n samples without a checker: the best by a score, and the majority. As estimates for k = 1 ... n.

GEM (arXiv 2408.16673) and SED-SFT report both: diversity among the samples is worth what these make of it.
"""

from collections.abc import Sequence

import numpy as np

from megatron_sfr.evaluation.code.pass_at_k import pass_at_k

DRAWS = 200  # orders of the samples that the majority is averaged over


def best_of_k(scores: Sequence[float], passed: Sequence[bool]) -> np.ndarray:
    """Probability that the best-scored of k samples passes, for k = 1 ... n, float64 [n]. Unbiased and exact.

    With m_g samples of the g highest scores, P(the best is of group g) = P(k samples hit m_g) - P(k samples hit
    m_(g-1)), both as in pass@k. Samples of equal score are chosen with equal probability.
    """
    n = len(scores)
    order = sorted(range(n), key=lambda i: -scores[i])
    result, before, m = np.zeros(n), np.zeros(n), 0
    while m < n:
        group = [i for i in order[m:] if scores[i] == scores[order[m]]]
        m += len(group)
        hit = pass_at_k(n, m)
        result += (hit - before) * np.mean([passed[i] for i in group])
        before = hit
    return result


def majority_at_k(answers: Sequence[str | None], right: str) -> np.ndarray:
    """Probability that the most frequent answer of k samples is right, for k = 1 ... n, float64 [n].

    Self-consistency (Wang et al., arXiv 2203.11171). The mean over `DRAWS` random orders, whose first k samples vote;
    answers with equally many votes share the probability. A sample without an answer (None) does not vote.
    """
    n = len(answers)
    names = sorted({answer for answer in answers if answer is not None} - {right})
    index = {name: i for i, name in enumerate([right, *names])}
    votes_NA = np.zeros((n, len(index)), dtype=np.int64)
    for i, answer in enumerate(answers):
        if answer is not None:
            votes_NA[i, index[answer]] = 1
    rng = np.random.default_rng(0)
    total = np.zeros(n)
    for _ in range(DRAWS):
        count_KA = votes_NA[rng.permutation(n)].cumsum(axis=0)
        most_K1 = count_KA.max(axis=1, keepdims=True)
        leads_KA = (count_KA == most_K1) & (most_K1 > 0)
        total += leads_KA[:, 0] / np.maximum(leads_KA.sum(axis=1), 1)
    return total / DRAWS
