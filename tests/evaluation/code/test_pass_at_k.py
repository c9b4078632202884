"""pass@k against enumeration, and where binomials overflow."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_sfr.evaluation.code.pass_at_k import pass_at_k


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_it_is_the_share_of_subsets_with_a_pass(n: int, c: int) -> None:
    passed = [True] * c + [False] * (n - c)
    enumerated = [np.mean([any(chosen) for chosen in combinations(passed, k)]) for k in range(1, n + 1)]
    np.testing.assert_allclose(pass_at_k(n, c), enumerated, atol=1e-12)


def test_it_is_exact_where_a_binomial_is_too_large_for_a_float() -> None:
    exact = [1 - comb(1997, k) / comb(2000, k) for k in (1, 10, 1000, 1997, 2000)]
    np.testing.assert_allclose(pass_at_k(2000, 3)[[0, 9, 999, 1996, 1999]], exact, rtol=1e-10)


def test_it_does_not_depend_on_what_was_not_drawn() -> None:
    """Unbiased: its mean over samples of a coin of probability p is 1 - (1 - p)^k."""
    n, p = 12, 0.3
    chance = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(weight * pass_at_k(n, c) for c, weight in enumerate(chance))
    np.testing.assert_allclose(mean, 1 - (1 - p) ** np.arange(1, n + 1))


@pytest.mark.parametrize(("n", "c"), [(0, 0), (3, 4), (3, -1)])
def test_counts_that_cannot_be_are_refused(n: int, c: int) -> None:
    with pytest.raises(ValueError, match="cannot pass"):
        pass_at_k(n, c)
