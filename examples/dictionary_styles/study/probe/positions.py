"""Positions at which hidden states are read: a bootstrap over their headwords, and probes fitted on half of them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sfr.evaluation.scores.bootstrap import DRAWS, resamples

PENALTIES = np.logspace(-4, 2, 13)  # of ridge regression, in units of the mean variance of a feature


@dataclass(frozen=True)
class Positions:
    """The headword and the persona of each position as indices, and the tokens of its reply before it; [N] each.

    quarter [P]: 0 to 3, by lot. Probes take quarters 0 and 1 as one half of the headwords, 2 and 3 as the other.
    """

    headword: np.ndarray
    persona: np.ndarray
    distance: np.ndarray
    quarter: np.ndarray

    def at(self, index: np.ndarray) -> "Positions":
        """Some of the positions; index [A] or bool [N]."""
        return Positions(self.headword[index], self.persona[index], self.distance[index], self.quarter)

    def sums(self, values_N: np.ndarray) -> np.ndarray:
        """The sum over the positions of each headword, [P]."""
        return np.bincount(self.headword, values_N, minlength=len(self.quarter))

    def share(self, part_N: np.ndarray, whole_N: np.ndarray) -> np.ndarray:
        """The sum of one over the sum of the other, [D]."""
        part, total = (weights(len(self.quarter)) @ self.sums(values) for values in (part_N, whole_N))
        return part / total

    def mean(self, values_N: np.ndarray) -> np.ndarray:
        return self.share(values_N, np.ones(len(values_N)))

    def tested(self, half: int) -> np.ndarray:
        """The positions outside a half of the headwords, 0 or 1: where its fits are tested; bool [N]."""
        return self.quarter[self.headword] // 2 != half

    def predict(self, half: int, x_NH: np.ndarray, y_NK: np.ndarray) -> np.ndarray:
        """y at all positions by ridge regression on x, fitted on one half, [N, K].

        The penalty is the one with which a fit on one quarter of that half predicts the other quarter best.
        """
        x_NH, quarter_N = x_NH.astype(np.float64), self.quarter[self.headword]
        trial, check = quarter_N == 2 * half, quarter_N == 2 * half + 1
        fit = Ridge(x_NH[trial], y_NK[trial])
        errors = [np.square(fit(x_NH[check], penalty) - y_NK[check]).sum() for penalty in PENALTIES]
        fitted = trial | check
        return Ridge(x_NH[fitted], y_NK[fitted])(x_NH, PENALTIES[np.argmin(errors)])


class Ridge:
    """Ridge regression in closed form, for any penalty: W = V (E + penalty mean(E))^-1 V^T C_xy, C_xx = V E V^T."""

    def __init__(self, x_NH: np.ndarray, y_NK: np.ndarray) -> None:
        self.x_H, self.y_K = x_NH.mean(axis=0), y_NK.mean(axis=0)
        centred_NH = x_NH - self.x_H
        self.values_H, self.vectors_HH = np.linalg.eigh(centred_NH.T @ centred_NH / len(x_NH))
        self.moments_HK = self.vectors_HH.T @ (centred_NH.T @ (y_NK - self.y_K)) / len(x_NH)

    def __call__(self, x_NH: np.ndarray, penalty: float) -> np.ndarray:
        values_H = self.values_H + penalty * self.values_H.mean()
        return self.y_K + (x_NH - self.x_H) @ (self.vectors_HH @ (self.moments_HK / values_H[:, None]))


@lru_cache(maxsize=4)
def weights(headwords: int) -> np.ndarray:
    """How often each headword counts [D, P]: once, then in each resample."""
    drawn = resamples(headwords)[: DRAWS // 4]
    return np.stack([np.ones(headwords), *(np.bincount(row, minlength=headwords) for row in drawn)])
