"""Lock, Fork or neutral: a label for each position, given by the base model and kept for every other one.

After "Embarrassingly Simple Self-Distillation" (arXiv 2604.01193): at a lock the next token is all but settled, at a
fork several futures are open. That paper gives no thresholds that we know of; these are ours, and are told.
"""

from dataclasses import dataclass

import numpy as np

LABELS = ("lock", "neutral", "fork")


@dataclass(frozen=True)
class LabelOptions:
    """Quantiles are over the positions that are labelled."""

    lock_entropy: float = 0.25  # quantile: entropy at most this
    lock_top: float = 0.9  # probability: the top token has at least this
    fork_entropy: float = 0.75  # quantile: entropy at least this
    fork_dispersion: float = 0.75  # quantile: dispersion of the futures at least this

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to 1")
        if self.lock_entropy >= self.fork_entropy:
            raise ValueError("the entropy of a lock lies below that of a fork: lower lock_entropy")


@dataclass(frozen=True)
class Labelled:
    """label [N]: of LABELS. rule: in words, with the numbers that the quantiles came to."""

    label: np.ndarray
    rule: str


def label(entropy: np.ndarray, top: np.ndarray, dispersion: np.ndarray | None, options: LabelOptions) -> Labelled:
    """Lock: entropy <= its quantile and top >= lock_top. Fork: entropy >= its quantile, and dispersion >= its own.

    Without a flow head there is no dispersion: a fork is then told by its entropy alone. Arrays [N].
    """
    low, high = np.quantile(entropy, [options.lock_entropy, options.fork_entropy])
    lock = (entropy <= low) & (top >= options.lock_top)
    fork = (entropy >= high) & (entropy > low)
    rule = f"lock: entropy at most {low:.3g} nats and top-1 mass at least {options.lock_top:g}; "
    rule += f"fork: entropy at least {high:.3g} nats"
    if dispersion is not None:
        wide = np.quantile(dispersion, options.fork_dispersion)
        fork &= dispersion >= wide
        rule += f" and dispersion of the futures at least {wide:.3g}"
    else:
        rule += " (no flow head: futures were not looked at)"
    return Labelled(np.where(lock, "lock", np.where(fork, "fork", "neutral")), rule)
