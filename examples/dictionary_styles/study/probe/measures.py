"""Measures of the hidden states of one model, and comparisons of models by the rule of the study's verdicts."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from examples.dictionary_styles.study.plan import BASELINE
from examples.dictionary_styles.study.probe.positions import Positions, weights
from examples.dictionary_styles.study.verdicts import Difference
from megatron_sfr.evaluation.scores.bootstrap import Estimate, interval

START = "start"
GROUPS = {
    "0 tokens": (0, 0),
    "1 to 3": (1, 3),
    "4 to 15": (4, 15),
    "16 or more": (16, 1 << 20),
}  # of the reply, both ends

Anchored = tuple[np.ndarray, np.ndarray]  # indices of anchors among the positions [A], and their targets [A, K]


def measures(h_NH: np.ndarray, at: Positions, futures: Mapping[str, Anchored]) -> dict[str, np.ndarray]:
    """Every measure of one model, [D] each."""
    found = {}
    right = np.zeros(len(h_NH), bool)
    for half in (0, 1):
        guess = at.predict(half, h_NH, one_hot(at.persona)).argmax(axis=1)
        right |= at.tested(half) & (guess == at.persona)
    for name, (first, last) in GROUPS.items():
        inside = (first <= at.distance) & (at.distance <= last)
        found[f"persona read after {name}"] = at.share(right & inside, inside)
    for name, (index, target_AK) in futures.items():
        found[f"R² of {name}"] = r_squared(h_NH[index], target_AK, at.at(index))
    found["variance between personas"] = between_personas(h_NH, at)
    found["participation ratio"] = participation_ratio(h_NH, at)
    found["norm"] = at.mean(np.linalg.norm(h_NH, axis=1))
    return found


def r_squared(h_AH: np.ndarray, target_AK: np.ndarray, at: Positions) -> np.ndarray:
    """The share of a target's variance that h explains beyond the persona and the distance from the start, [D]."""
    persona, distance = one_hot(at.persona), one_hot(np.minimum(at.distance // 8, 8))
    both = (persona[:, :, None] * distance[:, None]).reshape(len(persona), -1)
    known = np.concatenate([persona, distance, both], axis=1)
    rest_A, left_A = np.zeros(len(h_AH)), np.zeros(len(h_AH))
    for half in (0, 1):
        rest_AK = target_AK - at.predict(half, known, target_AK)
        left_AK = rest_AK - at.predict(half, h_AH, rest_AK)
        tested = at.tested(half)
        rest_A[tested], left_A[tested] = (np.square(x[tested]).sum(axis=1) for x in (rest_AK, left_AK))
    return 1 - at.share(left_A, rest_A)


def between_personas(h_NH: np.ndarray, at: Positions) -> np.ndarray:
    """The share of the variance of h that lies between the means of the personas, [D]."""
    h_NH, member_NK, weight_DP = h_NH - h_NH.mean(axis=0), one_hot(at.persona), weights(len(at.quarter))
    sums_PKH = np.zeros((len(at.quarter), member_NK.shape[1], h_NH.shape[1]))
    np.add.at(sums_PKH, (at.headword, at.persona), h_NH)
    count_DK = weight_DP @ np.stack([at.sums(member) for member in member_NK.T], axis=1)
    sums_DKH = np.tensordot(weight_DP, sums_PKH, 1)
    mean_D = np.square(sums_DKH.sum(axis=1)).sum(axis=1) / count_DK.sum(axis=1)
    means_D = (np.square(sums_DKH).sum(axis=2) / np.maximum(count_DK, 1)).sum(axis=1)
    return (means_D - mean_D) / (weight_DP @ at.sums(np.square(h_NH).sum(axis=1)) - mean_D)


def participation_ratio(h_NH: np.ndarray, at: Positions) -> np.ndarray:
    """(tr C)^2 / tr C^2 of the covariance C of h, [D]: k if the variance is spread evenly over k directions."""
    h_NH, weight_DP = (h_NH - h_NH.mean(axis=0)).astype(np.float32), weights(len(at.quarter))
    own = [h_NH[at.headword == p] for p in range(len(at.quarter))]
    moments_PX = np.stack([(h.T @ h).ravel() for h in own])  # M_p, so that C = M / n - m m^T with M the weighted sum
    count_D = weight_DP @ at.sums(np.ones(len(h_NH)))
    mean_DH = weight_DP @ np.stack([h.sum(axis=0) for h in own]) / count_D[:, None]
    along_PD = np.stack([np.square(h @ mean_DH.T.astype(np.float32)).sum(axis=0) for h in own])  # m^T M_p m
    square_D = np.square(mean_DH).sum(axis=1)
    trace_D = weight_DP @ at.sums(np.square(h_NH).sum(axis=1)) / count_D - square_D
    squares_D = ((weight_DP @ (moments_PX @ moments_PX.T)) * weight_DP).sum(axis=1) / count_D**2
    return trace_D**2 / (squares_D - 2 * (weight_DP.T * along_PD).sum(axis=0) / count_D + square_D**2)


def one_hot(index_N: np.ndarray) -> np.ndarray:
    return np.eye(index_N.max() + 1)[index_N]


def difference(arm_SD: np.ndarray, baseline_SD: np.ndarray, headwords: int) -> Difference:
    """An arm minus a baseline in one measure. Seeds and headwords are resampled together, as in `verdicts.compare`."""
    minus_SD = arm_SD - baseline_SD
    seeds = np.random.default_rng(0).integers(len(minus_SD), size=(len(minus_SD), minus_SD.shape[1] - 1))
    drawn = np.take_along_axis(minus_SD[:, 1:], seeds, axis=0).mean(axis=0)
    noise = max(abs(float(x - y)) for x, y in combinations(baseline_SD[:, 0], 2))
    by_seed = minus_SD[:, 0]
    return Difference(Estimate(float(by_seed.mean()), *interval(drawn), headwords), tuple(by_seed.tolist()), noise)


def relations(h: Mapping[str, list[np.ndarray]], at: Positions, arm: str) -> list[list[str]]:
    """A table of how far models lie from the start and from each other, in h at the same positions. h: [N, H] per seed.

    The distance is a root mean square, in units of that of the start's h to its mean. Values are means over seeds.
    """
    (start,) = h[START]
    others = [name for name in h if name not in (START, arm)]
    pairs = {f"{name} and the start": [(x, start) for x in h[name]] for name in (*others, arm)}
    pairs |= {f"{arm} and {name}, same seed": list(zip(h[arm], h[name], strict=True)) for name in others}
    pairs[f"{BASELINE} and {BASELINE}, other seed"] = list(combinations(h[BASELINE], 2))
    spread = np.square(start - start.mean(axis=0)).sum(axis=1)

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return at.mean((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))

    table = [["models", "distance", "cosine", "cosine of the changes since the start"]]
    for title, found in pairs.items():
        distances = [np.sqrt(at.share(np.square(a - b).sum(axis=1), spread)) for a, b in found]
        changes = [cosine(a - start, b - start) for a, b in found if b is not start]
        cells = (distances, [cosine(a, b) for a, b in found], changes)
        table.append([title, *(estimate(np.mean(cell, axis=0)) if cell else "" for cell in cells)])
    return table


def estimate(values_D: np.ndarray) -> str:
    low, high = interval(values_D[1:])
    return f"{values_D[0]:.3f} [{low:.3f}, {high:.3f}]"
