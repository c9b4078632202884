"""What every model is asked, how much of its answers the scores use, and what they read of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_sfr.data.chat.conversation import Conversation
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.scores.embeddings import THRESHOLD
from megatron_sfr.evaluation.scores.tokenizers import CHOICES, Choice


@dataclass(frozen=True)
class EvaluationOptions:
    """What to sample, and how much of it the quadratic and the slow metrics use.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.EvaluationOptions(sfr.SamplingOptions(samples=4), temperatures=(0.5, 1.0)).pairs
        16
    """

    sampling: SamplingOptions
    """How replies are sampled, except the temperature."""
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0, 1.3)
    """Each model is sampled at all of them."""
    pairs: int = 16
    """BLEU comparisons: for each prompt and persona (self-BLEU), for each prompt (cross-style BLEU)."""
    embedded: int = 4
    """Replies to embed for each prompt and persona."""
    embedded_prompts: int = 32
    """Number of shared prompts whose replies are embedded."""
    mode_threshold: float = THRESHOLD
    """Smallest cosine of two real replies of one mode, and of a reply that hits it."""
    bleu_tokenize: Choice = "auto"
    """Tokenizer of BLEU. 'auto': by the script of prompts and real replies."""
    one_temperature: bool = False
    """Whether a single temperature is accepted. Diversity at one temperature alone says little."""

    def __post_init__(self) -> None:
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("temperatures: give at least one, each once")
        if len(self.temperatures) < 2 and not self.one_temperature:
            raise ValueError(
                "one temperature cannot distinguish diversity from a higher temperature: give two or more, "
                "or use --one-temperature"
            )
        if self.bleu_tokenize not in CHOICES:
            raise ValueError(f"bleu_tokenize is {self.bleu_tokenize!r}; choose one of {', '.join(CHOICES)}")
        for name in ("pairs", "embedded", "embedded_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


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


def sorted_temperatures(temperatures: Iterable[float | None]) -> list[float | None]:
    """Each temperature once, in increasing order; an unknown one comes first."""
    return sorted(set(temperatures), key=lambda temperature: -1.0 if temperature is None else temperature)
