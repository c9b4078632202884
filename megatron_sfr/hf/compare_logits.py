"""Compares two HF folders by their logits on random tokens, computed by transformers on CPU in fp32."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.hf_folder import load_model

TOLERANCE = 1e-5
"""Largest accepted difference relative to the largest logit: allows for rounding in fp32 only."""
SHAPE = (4, 32)
"""Sequences and tokens of each that are compared."""


@dataclass(frozen=True)
class CheckReport:
    """The largest difference of any logit, the largest logit, and the number of logits compared."""

    difference: float
    largest: float
    logits: int


def check_logits(folder: Path, reference: Path, *, tolerance: float = TOLERANCE) -> CheckReport:
    """Compares `folder` with `reference`. Raises ValueError if they differ by more than tolerance * the largest logit.

    Both are computed in fp32, whatever their dtype, one after the other, so only one model is in memory at a time.
    """
    expected, actual = _logits(reference), _logits(folder)
    if actual.shape != expected.shape:
        raise ValueError(f"{folder} has {actual.shape[-1]} logits a token, {reference} has {expected.shape[-1]}")
    report = CheckReport((actual - expected).abs().max().item(), expected.abs().max().item(), expected.numel())
    if not report.difference <= tolerance * report.largest:
        raise ValueError(
            f"{folder} is not the model of {reference}: logits differ by {report.difference:.3g}, "
            f"more than {tolerance:g} of the largest, {report.largest:.3g}"
        )
    return report


@torch.no_grad()
def _logits(folder: Path) -> Tensor:
    model = load_model(folder, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, SHAPE, generator=generator)
    logits: Tensor = model(tokens).logits
    return logits
