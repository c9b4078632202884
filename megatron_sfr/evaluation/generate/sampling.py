"""How replies are sampled, and a sampled reply as a value and as a record. No torch: it is read without a model."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.storage.user_files import is_finite, shown

MAX_SAMPLES = 4096  # the generator's counter gives the sample twelve bits


@dataclass(frozen=True)
class SamplingOptions:
    """How replies are sampled.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.SamplingOptions(samples=4, temperature=0.8).max_new_tokens
        256
    """

    samples: int = 8
    """Replies for each prompt."""
    temperature: float = 1.0
    """Divides the logits. 0 is greedy decoding."""
    top_k: int = 0
    """Number of most likely tokens to draw from; 0: all."""
    top_p: float = 1.0
    """Probability mass of the most likely tokens to draw from; 1: all."""
    max_new_tokens: int = 256
    """Largest number of tokens of a reply."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 64
    """Replies that are generated at a time."""
    template: TemplateOptions = field(default_factory=TemplateOptions)
    """How prompts are written. It must be that of training."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.samples > MAX_SAMPLES:
            raise ValueError(
                f"samples is {self.samples}; at most {MAX_SAMPLES} replies per prompt have separate random numbers"
            )
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k are at least 0, top_p is above 0 and at most 1")


@dataclass(frozen=True)
class Verbalization:
    """Where a reply of Verbalized Sampling comes from."""

    k: int
    """Replies that the model was asked for."""
    candidates: int
    """Replies with probabilities that its answer holds; 0 if it cannot be read."""
    probability: float | None
    """Of the drawn reply, after normalization."""
    answer: str
    """The complete answer."""


@dataclass(frozen=True)
class Sampled:
    """One reply."""

    sample: int
    text: str
    tokens: tuple[int, ...]
    """Ids, end token included; empty if a server sampled it."""
    logprob: float | None
    """Sum of ln p over its tokens, end token included, at temperature 1 without truncation; None if unknown."""
    finished: bool
    """Whether the reply ended by itself, not at max_new_tokens."""
    reported_length: int | None = None
    """A server's count of the tokens."""
    verbalized: Verbalization | None = None

    @property
    def length(self) -> int | None:
        """Number of tokens; None if unknown."""
        return len(self.tokens) or self.reported_length


def in_order(ids: Sequence[Sequence[int]], samples: int) -> list[tuple[int, int]]:
    """(index of the prompt, sample) of every reply, short prompts first."""
    return [(p, s) for p in sorted(range(len(ids)), key=lambda p: len(ids[p])) for s in range(samples)]


def seed_of(seed: int, prompt: Prompt, sample: int) -> int:
    """The seed of one reply, below 2^31: a function of the command's seed, the prompt and the sample index only."""
    digest = hashlib.sha256(f"{seed} {prompt.key} {sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def setting_of(fields: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Model and temperature of a reply's record; None where it has none. Raises ValueError if they are not such."""
    model, temperature = fields.get("model"), fields.get("temperature")
    if model is not None and (not isinstance(model, str) or not model):
        raise ValueError(f"the model is {shown(model)}; give its name, or leave it out")
    if temperature is not None and not (is_finite(temperature) and temperature >= 0):
        raise ValueError(f"the temperature is {shown(temperature)}; give a number of at least 0, or leave it out")
    return model, temperature


def reply_line(name: str, prompt: Prompt, options: SamplingOptions, reply: Sampled) -> str:
    """A reply as a line of JSONL."""
    verbalized = {} if reply.verbalized is None else {"verbalized": asdict(reply.verbalized)}
    fields = {
        "model": name,
        "prompt": prompt.shared,
        "question": prompt.question,
        "persona": prompt.persona,
        "sample": reply.sample,
        "seed": options.seed,
        "temperature": options.temperature,
        "text": reply.text,
        "tokens": reply.length,
        "logprob": None if reply.logprob is None else round(reply.logprob, 4),
        "finished": reply.finished,
        **verbalized,
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"
