"""Labels each position as Lock, Fork or neutral, by the base model; the other models share these labels.

After "Embarrassingly Simple Self-Distillation" (arXiv 2604.01193): at a lock the next token is almost certain, at a
fork several futures are open. We found no thresholds in that paper; ours are options and are reported.
"""

from dataclasses import dataclass

import numpy as np

LABELS = ("lock", "neutral", "fork")


@dataclass(frozen=True)
class LabelOptions:
    """Thresholds of the labels. Quantiles are taken over the labelled positions."""

    lock_entropy: float = 0.25
    """Quantile: entropy at most this."""
    lock_top: float = 0.9
    """Probability: the top token has at least this."""
    fork_entropy: float = 0.75
    """Quantile: entropy at least this."""
    fork_dispersion: float = 0.75
    """Quantile: dispersion of the futures at least this."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to 1")
        if self.lock_entropy >= self.fork_entropy:
            raise ValueError(
                f"lock_entropy is {self.lock_entropy} and fork_entropy is {self.fork_entropy}: "
                "lower lock_entropy below fork_entropy"
            )


@dataclass(frozen=True)
class Labelled:
    """label [N]: one of LABELS each. rule: the rule in words, with the values of the quantiles."""

    label: np.ndarray
    rule: str


def label(entropy: np.ndarray, top: np.ndarray, dispersion: np.ndarray | None, options: LabelOptions) -> Labelled:
    """Lock: entropy <= its quantile and top >= lock_top. Fork: entropy >= its quantile, and dispersion >= its own.

    Without a flow head there is no dispersion, and forks are defined by entropy alone. Arrays [N].
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
        rule += " (no flow head, so futures are not used)"
    return Labelled(np.where(lock, "lock", np.where(fork, "fork", "neutral")), rule)
