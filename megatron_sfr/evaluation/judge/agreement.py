"""How far several votes about the same thing agree: Krippendorff's alpha for numbers."""

from collections.abc import Sequence

import numpy as np


def krippendorff_alpha(votes: Sequence[Sequence[float]]) -> float:
    """alpha = 1 - D_o / D_e, with the interval metric (a - b)^2.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). D_o is the mean difference of two votes about one
    unit, where a unit u of m_u votes has weight m_u; D_e that of any two of all n votes:

        D_o = 1/n sum_u 1/(m_u - 1) sum_{i, j in u} (v_i - v_j)^2,  D_e = 1/(n (n - 1)) sum_{i, j} (v_i - v_j)^2

    1: votes of a unit are equal; 0: they differ as much as votes of different units; below 0: more than these.

    Args:
        votes: those of each unit. Units with one vote or without votes do not count.
    Returns:
        NaN if no unit has two votes, or if all votes are equal, where agreement and chance cannot be told apart.
    """
    units = [np.array(unit, float) for unit in votes if len(unit) > 1]
    if not units:
        return float("nan")
    every = np.concatenate(units)
    observed = sum(_differences(unit) / (len(unit) - 1) for unit in units) / len(every)
    expected = _differences(every) / (len(every) * (len(every) - 1))
    return float(1 - observed / expected) if expected > 0 else float("nan")


def _differences(values: np.ndarray) -> float:
    """The sum of (a - b)^2 over all ordered pairs."""
    centred = values - values.mean()
    return float(2 * len(values) * np.sum(centred**2))
