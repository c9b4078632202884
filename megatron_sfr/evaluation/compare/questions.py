"""What every model is asked, and what the scores read of its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_sfr.data.chat.conversation import Conversation
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import SamplingOptions


@dataclass(frozen=True)
class Questions:
    """Prompts, sampling options for each temperature, and named sets of real replies; the same for every model."""

    prompts: Sequence[Prompt]
    sweep: Sequence[SamplingOptions]
    sets: Mapping[str, Sequence[Conversation]]


@dataclass(frozen=True)
class Answered:
    """The text of a model's replies, and its losses.

    replies: by temperature, entry of `asked` and sample; may be read from a file when accessed.
    utilities: how good each reply is, by a scorer of the user's; None if some reply has none.
    temperatures: None where it is unknown.
    losses: for each set of real replies -ln p of each conversation, and its number of supervised tokens.
    """

    model: str
    temperatures: tuple[float | None, ...]
    replies: Sequence[Sequence[Sequence[str]]]
    losses: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    utilities: Sequence[Sequence[Sequence[float]]] | None = None


def shown_temperature(temperature: float | None) -> str:
    """The temperature in a table; a dash if it is unknown."""
    return "-" if temperature is None else f"{temperature:g}"
