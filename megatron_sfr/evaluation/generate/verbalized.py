"""Verbalized Sampling: a model writes several replies with their probabilities, and one is drawn by these weights.

Zhang et al., arXiv 2510.01171, in its standard form: only the prompt differs from plain sampling. Each reply is drawn
from a separate answer, so that the replies to a prompt are independent. Works with every engine.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.evaluation.generate.engines import Engine
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions, Verbalization, seed_of
from megatron_sfr.evaluation.generate.thinking import without_thoughts
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.user_files import parse_json

INSTRUCTIONS = """<instructions>
Generate {k} responses to the user query, each within a separate <response> tag. Each <response> must include a <text> \
and a numeric <probability>. Randomly sample the responses from the full distribution.
</instructions>

"""
"""Put before the last user turn: the paper's prompt for the full distribution."""
RESPONSE = re.compile(r"<response\b[^>]*>(.*?)(?:</response>|(?=<response\b)|\Z)", re.DOTALL | re.IGNORECASE)
TEXT = re.compile(r"<text\b[^>]*>(.*?)</text>", re.DOTALL | re.IGNORECASE)
PROBABILITY = re.compile(r"<probability\b[^>]*>([^<]*)", re.IGNORECASE)
NUMBER = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e-?\d+)?)\s*(%?)", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A reply that the model wrote, and the probability that it gave."""

    text: str
    probability: float | None
    """None if it is not a number."""


@dataclass(frozen=True)
class Verbalized:
    """An engine whose replies are drawn from the distributions that another engine's models write."""

    engine: Engine
    k: int
    """Replies that an answer is asked for."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"--verbalized {self.k}: a distribution has at least 2 replies")

    @property
    def models(self) -> Sequence[str]:
        return self.engine.models

    @property
    def shares_randomness(self) -> bool:
        return self.engine.shares_randomness

    def check(self) -> None:
        self.engine.check()

    def identity(self) -> dict[str, object]:
        return self.engine.identity() | {"verbalized": self.k}

    def load(self, name: str, template: TemplateOptions) -> Any:
        return self.engine.load(name, template)

    def sample(
        self, model: Any, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
    ) -> Iterator[tuple[int, Sampled]]:
        """A reply that cannot be read is empty, and its `verbalized.candidates` is 0."""
        asked = [with_instructions(prompt, self.k) for prompt in prompts]
        for p, reply in self.engine.sample(model, asked, options, start=start):
            yield p, drawn(reply, self.k, seed_of(options.seed, prompts[p], reply.sample) / 2**31)

    def kept(self, done: int, options: SamplingOptions) -> int:
        return self.engine.kept(done, options)

    @property
    def gives_losses(self) -> bool:
        return False


def with_instructions(prompt: Prompt, k: int) -> Prompt:
    """The prompt that asks for k replies with probabilities."""
    *before, (role, question) = prompt.messages
    return Prompt((*before, (role, INSTRUCTIONS.format(k=k) + question)), prompt.persona)


def drawn(answer: Sampled, k: int, u: float) -> Sampled:
    """One of the answer's replies, by the inverse of the cumulative distribution at u in [0, 1).

    Its log-probability is unknown; its tokens are those of the answer.
    """
    found = candidates(answer.text)
    weights = weights_of(found)
    text, probability, total = "", None, 0.0
    for candidate, weight in zip(found, weights, strict=True):
        total += weight
        if weight and (probability is None or u >= total - weight):
            text, probability = candidate.text, weight
    made = Verbalization(k, len(found), probability, answer.text)
    return replace(answer, text=text, logprob=None, verbalized=made)


def candidates(answer: str) -> list[Candidate]:
    """The replies in an answer, tagged or as JSON objects; of an answer that is cut off, those that are complete."""
    text = without_thoughts(answer)
    found = [*_tagged(text)] or [*_objects(text)]
    return [candidate for candidate in found if candidate.text]


def weights_of(found: Sequence[Candidate]) -> list[float]:
    """Probabilities that sum to 1. Replies without a number have weight 0; all are equal if none has a number above 0.

    Models rarely write probabilities that sum to 1.
    """
    given = [candidate.probability or 0.0 for candidate in found]
    total = sum(given)
    return [weight / total for weight in given] if total > 0 else [1 / len(found) for _ in found]


def _tagged(text: str) -> Iterator[Candidate]:
    for block in RESPONSE.findall(text):
        inner, number = TEXT.search(block), PROBABILITY.search(block)
        if inner:
            yield Candidate(inner[1].strip(), _number(number[1] if number else None))
        elif number and "<text" not in block.lower():  # the text stands without its tag
            yield Candidate((block[: number.start()].strip()), _number(number[1]))


def _objects(text: str) -> Iterator[Candidate]:
    """JSON objects with text and probability, wherever they stand: in a list, in an object, in a code fence."""
    decoder, at = json.JSONDecoder(strict=False), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1  # cut off, or not JSON: what is inside may be complete
        yield from _from_json(value)
        at = text.find("{", end)


def _from_json(value: Any) -> Iterator[Candidate]:
    level = [value]
    while level:
        inner = level.pop(0)
        if isinstance(inner, dict) and isinstance(inner.get("text"), str) and "probability" in inner:
            yield Candidate(inner["text"].encode(errors="replace").decode().strip(), _number(str(inner["probability"])))
        elif isinstance(inner, dict | list):
            level += inner.values() if isinstance(inner, dict) else inner


def _number(text: str | None) -> float | None:
    """0.2 of `0.2`, `20%` or `~ .2`; None for other texts, and above 1 without a percent sign."""
    found = NUMBER.search(text or "")
    if not found or "-" in (text or "")[: found.start()]:
        return None
    value = float(found[1]) / (100 if found[2] else 1)
    return value if value <= 1 else None


def unreadable(path: Path) -> int:
    """How many records of a file of `generate` come from an answer without a reply."""
    found = (parse_json(record.text).get("verbalized") or {} for record in read_records(path))
    return sum(verbalized.get("candidates") == 0 for verbalized in found)
