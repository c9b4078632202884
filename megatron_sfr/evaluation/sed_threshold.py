"""Calibrates SED's threshold tau (arXiv 2602.07464) on sample data: tokens with P_k >= tau are exempt.

P_k is computed as in the loss: the same pass over the logits, in their dtype, and the same sum of the k largest.
Shapes: L positions, V vocabulary, T counted tokens of a batch, n counted tokens in all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.data.prepared.conversations import PreparedData, Sample
from megatron_sfr.evaluation.conversation_logits import check_same_tokens, chosen_logits
from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.kernels import choose
from megatron_sfr.kernels.vocab_parallel import combine
from megatron_sfr.objectives.token.sed import check_top_k, top_mass

ABOVE_ALL = 2.0  # larger than any probability


@dataclass(frozen=True)
class CalibrationOptions:
    """The tokens to count, and the share of them to exempt."""

    top_k: int = 10
    exempt: float = 0.7
    samples: int = 100
    batch_size: int = 8
    tokens: Literal["supervised", "all"] = "supervised"

    def __post_init__(self) -> None:
        check_top_k(self.top_k, "sed_top_k")  # the loss uses the same number
        if not 0 < self.exempt < 1:
            raise ValueError(f"exempt is {self.exempt}; give a share of the tokens between 0 and 1, such as 0.7")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True)
class Threshold:
    """tau as written in a recipe, and how many of the n tokens it exempts; `tied` tokens have the P_k next to tau."""

    tau: str
    exempt: int
    tied: int
    n: int

    @property
    def share(self) -> float:
        return self.exempt / self.n


def top_masses(model: Model, data: PreparedData, options: CalibrationOptions, *, progress: bool = True) -> Tensor:
    """P_k at each counted token of the first samples, in no particular order: fp32 [n]."""
    from tqdm import tqdm

    check_same_tokens(model, data, options.top_k)
    samples = [data[i] for i in range(min(options.samples, len(data)))]
    if not any(_wanted(sample, options).any() for sample in samples):
        raise ValueError(f"the first {len(samples)} conversations of {data.folder} have no supervised token to count")
    samples.sort(key=lambda sample: len(sample.tokens))  # similar lengths in a batch need little padding
    found = []
    with tqdm(total=len(samples), desc="calibrate", unit="conversation", disable=not progress) as bar:
        for start in range(0, len(samples), options.batch_size):
            batch = samples[start : start + options.batch_size]
            wanted = [_wanted(sample, options) for sample in batch]
            found += [_masses(logits_TV, options.top_k).cpu() for _, logits_TV in chosen_logits(model, batch, wanted)]
            bar.update(len(batch))
    return torch.cat(found)


def threshold(p_n: Tensor, exempt: float) -> Threshold:
    """The tau whose exempt share (P_k >= tau) is nearest to `exempt`; without ties it is within 1 / (2 n).

    It lies between two values of P_k, so that rounding elsewhere does not move a token across it, and has no more
    digits than needed.
    """
    value_m, tied_m = np.unique(p_n.float().numpy(), return_counts=True)
    value_m, tied_m = value_m[::-1], tied_m[::-1]  # descending: the first j values are exempt
    exempt_j = np.concatenate([[0], tied_m.cumsum()])
    j = int(np.abs(exempt_j - exempt * len(p_n)).argmin())
    upper = float(value_m[j - 1]) if j else ABOVE_ALL
    lower = float(value_m[j]) if j < len(value_m) else 0.0
    nearest = (
        tied_m[j] if exempt_j[j] < exempt * len(p_n) else tied_m[j - 1]
    )  # tokens that the next value would add or remove
    return Threshold(_decimal(lower, upper), int(exempt_j[j]), int(nearest), len(p_n))


def _decimal(lower: float, upper: float) -> str:
    """A short decimal near the middle of two fp32 numbers; the upper one if they are adjacent in fp32.

    In fp32, in which the loss compares, it is above lower and at most upper.
    """
    for wanted, reach in (((lower + upper) / 2, (upper - lower) / 4), (upper, upper - lower)):
        for digits in range(2, 17):
            text = f"{wanted:.{digits}f}"
            if lower < np.float32(text) <= upper and abs(float(text) - wanted) <= reach:
                return text
    raise AssertionError(f"no decimal above {lower} up to {upper}")


def _wanted(sample: Sample, options: CalibrationOptions) -> np.ndarray:
    """Which inputs (all tokens but the last) predict a counted token: bool [L]."""
    return sample.loss_mask[1:] > 0 if options.tokens == "supervised" else np.ones(len(sample.tokens) - 1, dtype=bool)


def _masses(z_TV: Tensor, top_k: int) -> Tensor:
    """P_k of each token as in SED's loss: [T]."""
    nowhere_T = torch.full(z_TV.shape[:1], -1, device=z_TV.device)
    unread_T = torch.zeros(z_TV.shape[:1], device=z_TV.device)
    kernels = choose(z_TV)
    stats_TN = kernels.row_statistics(z_TV, nowhere_T, unread_T, beta=1.0, moments=False, c=0.0, top_k=top_k)
    return top_mass(combine(stats_TN[None], 1.0))
