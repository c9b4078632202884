"""pass@k: the probability that at least one of k samples of a task passes."""

import numpy as np


def pass_at_k(n: int, c: int) -> np.ndarray:
    """Unbiased pass@k of one task for k = 1 ... n, float64 [n], if c of n samples pass.

    pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374) = 1 - prod_(i < k) (n - c - i) / (n - i): each
    factor is in [0, 1], and no binomial is computed. k > n has no unbiased estimate. Raises ValueError unless
    0 <= c <= n.
    """
    if not 0 <= c <= n or n < 1:
        raise ValueError(f"{c} of {n} samples cannot pass; give at least one sample and 0 <= c <= n")
    i = np.arange(n)
    return 1 - np.cumprod(np.maximum(n - c - i, 0) / (n - i))
