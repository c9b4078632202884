"""What quantization changes: the loss on text, and the logits, of a model against the original's in bf16.

Shapes: S tokens of a conversation, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Accuracy:
    """A quantized model against the original in bf16, on conversations that did not calibrate it."""

    loss: float
    """Cross-entropy of the quantized model, in nats per token."""
    original_loss: float
    rms: float
    """Root mean square of the difference of the logits, relative to that of the original's."""
    largest: float
    """Largest difference of a logit."""
    agreement: float
    """Share of positions at which both models have the same most likely token."""
    compared: int
    """Conversations."""


@torch.no_grad()
def logits_of(model: Any, tokens_1S: Tensor) -> Tensor:
    """Logits [S, V] of a conversation, in the model's dtype."""
    logits: Tensor = model(tokens_1S).logits[0]
    return logits


def accuracy(model: Any, conversations: Sequence[Tensor], originals: Sequence[Tensor]) -> Accuracy:
    """Compares a quantized model with the original's logits of the same conversations, one after the other."""
    square = original_square = loss = original_loss = largest = 0.0
    same = predicted = positions = 0
    for tokens_1S, original_SV in zip(conversations, originals, strict=True):
        actual_SV, expected_SV = logits_of(model, tokens_1S).float(), original_SV.float()
        difference_SV = actual_SV - expected_SV
        square += difference_SV.square().sum(dtype=torch.float64).item()
        original_square += expected_SV.square().sum(dtype=torch.float64).item()
        largest = max(largest, difference_SV.abs().max().item())
        same += int((actual_SV.argmax(-1) == expected_SV.argmax(-1)).sum())
        positions += len(actual_SV)
        loss += cross_entropy(actual_SV[:-1], tokens_1S[0, 1:], reduction="sum").item()
        original_loss += cross_entropy(expected_SV[:-1], tokens_1S[0, 1:], reduction="sum").item()
        predicted += len(actual_SV) - 1
    return Accuracy(
        loss=loss / predicted,
        original_loss=original_loss / predicted,
        rms=(square / original_square) ** 0.5,
        largest=largest,
        agreement=same / positions,
        compared=len(conversations),
    )
