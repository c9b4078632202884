"""Best of k and majority of k against every subset of the samples."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from megatron_sfr.evaluation.code.best_of_k import best_of_k, majority_at_k
from megatron_sfr.evaluation.code.pass_at_k import pass_at_k

SCORES = [0.5, 0.9, 0.5, 0.1, 0.9, 0.3]
PASSED = [True, False, False, True, True, False]


def test_the_best_of_k_is_the_mean_over_all_subsets() -> None:
    for k, found in enumerate(best_of_k(SCORES, PASSED), start=1):
        values = []
        for chosen in combinations(range(6), k):
            top = max(SCORES[i] for i in chosen)
            values.append(np.mean([PASSED[i] for i in chosen if SCORES[i] == top]))
        assert found == pytest.approx(np.mean(values))


def test_a_perfect_score_reaches_pass_at_k_and_a_constant_one_pass_at_1() -> None:
    assert best_of_k([float(x) for x in PASSED], PASSED) == pytest.approx(pass_at_k(6, 3))
    assert best_of_k([1.0] * 6, PASSED) == pytest.approx(np.full(6, 0.5))


def test_the_majority_is_near_the_mean_over_all_subsets() -> None:
    answers = ["a", "b", "a", None, "c", "b", "a"]
    for k, found in enumerate(majority_at_k(answers, "a"), start=1):
        values = []
        for chosen in combinations(answers, k):
            votes = Counter(answer for answer in chosen if answer is not None)
            leads = [answer for answer, n in votes.items() if n == max(votes.values())]
            values.append(leads.count("a") / max(len(leads), 1))
        assert found == pytest.approx(np.mean(values), abs=0.08)  # 200 orders: a standard error of at most 0.035


def test_nobody_votes_or_nobody_is_right() -> None:
    assert majority_at_k([None, None], "a").tolist() == [0, 0]
    assert majority_at_k(["b", None], "a").tolist() == [0, 0]
    assert majority_at_k(["a", "a"], "a").tolist() == [1, 1]
