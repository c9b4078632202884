"""The demo's persona world: a seeded generator of prompts and replies, and an exact parser of replies.

A prompt consists of a topic and a person (`who`). A correct reply has four parts in the voice of its persona: opening,
plan, reason, closing. Its *mode*, its content, is (plan, reason): the plan must answer the topic, and the reason must
hold for the plan. Six plans with three reasons each give 18 equally correct modes for every persona and prompt.

Held-out modes can be inferred. On each topic, shuffled decks of the 18 modes are dealt to the personas, nine to each,
so that four or five personas use each mode. A persona's nine modes form a ring, and each of the six `who` is shown
three neighbours on it. For a prompt there are two kinds of unseen modes:
- near: in fine-tuning the persona uses the mode, but about another person. Correctness never depends on `who`.
- far: in fine-tuning the persona never uses the mode. Other personas do for the same prompt, and in pretraining it is
  as frequent as any other.
A model that separates voice, content and person finds both; a model that repeats its training set finds neither.

The pretraining corpus is broader: it has no persona, every correct mode of every prompt is equally frequent, and the
voice of each part is drawn separately. It teaches the language and the correct content, but not the personas.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import NamedTuple, TypedDict

from .language import REASONS, TOPICS, VOICES, WHO

PARTS = ("opening", "plan", "reason", "closing")
PERSONAS = tuple(VOICES)
SPOKEN = 9  # modes per persona and topic in fine-tuning
SHOWN = 3  # of these, modes per prompt
WORDINGS = tuple(product((0, 1), (0, 1), (0, 1), (0, 1)))  # one of two wordings for each part


class Record(TypedDict, total=False):
    """A JSONL record; pretraining records have no persona."""

    persona: str
    messages: list[dict[str, str]]


class Mode(NamedTuple):
    """The content of a reply, which coverage counts."""

    plan: str
    reason: str
    """Key of REASONS."""


class Question(NamedTuple):
    """A prompt, the same for all personas."""

    topic: str
    """Key of TOPICS."""
    who: str

    @property
    def text(self) -> str:
        return TOPICS[self.topic].question.format(who=self.who)


@dataclass(frozen=True)
class Reply:
    """A parsed reply: voice and wording of each of the four parts, the person it is about, and its mode."""

    voices: tuple[str, str, str, str]
    wordings: tuple[int, int, int, int]
    who: str
    mode: Mode

    @property
    def persona(self) -> str | None:
        """The persona, if all parts have the same voice; else None."""
        return self.voices[0] if len(set(self.voices)) == 1 else None


QUESTIONS = tuple(Question(topic, who) for topic in TOPICS for who in WHO)
_QUESTION_OF_TEXT = {question.text: question for question in QUESTIONS}


def question_of(text: str) -> Question:
    """The prompt with this text."""
    if text not in _QUESTION_OF_TEXT:
        raise ValueError(f"the demo's world has no prompt {text!r}: use one of QUESTIONS")
    return _QUESTION_OF_TEXT[text]


@cache
def modes(topic: str) -> tuple[Mode, ...]:
    """All correct modes of a topic, for every persona and person."""
    return tuple(Mode(plan, reason) for plan, reasons in TOPICS[topic].plans.items() for reason in reasons)


def is_right(question: Question, reply: Reply) -> bool:
    """Whether the reply is about the prompt's person and its mode is one of the topic's."""
    return reply.who == question.who and reply.mode in modes(question.topic)


def render(reply: Reply) -> str:
    """The text of a reply."""
    slots = {"who": reply.who, "plan": reply.mode.plan, "reason": REASONS[reply.mode.reason]}
    frames = (
        getattr(VOICES[voice], part)[wording]
        for part, voice, wording in zip(PARTS, reply.voices, reply.wordings, strict=True)
    )
    return " ".join(frame.format(**slots) for frame in frames)


def parse(text: str) -> Reply | None:
    """The reply that renders to exactly this text, correct or not; None if there is none."""
    tables = _sentences()
    opening = next((sentence for sentence in tables["opening"] if text.startswith(sentence + " ")), None)
    closing = next((sentence for sentence in tables["closing"] if text.endswith(" " + sentence)), None)
    if opening is None or closing is None:
        return None
    middle = text[len(opening) + 1 : -len(closing) - 1]
    reason = next((sentence for sentence in tables["reason"] if middle.endswith(" " + sentence)), None)
    plan = None if reason is None else middle[: -len(reason) - 1]
    if reason is None or plan not in tables["plan"]:
        return None
    parsed = [tables[part][sentence] for part, sentence in zip(PARTS, (opening, plan, reason, closing), strict=True)]
    voices, wordings, slots = zip(*parsed, strict=True)
    _, (who, said), (given,), _ = slots
    return Reply(voices, wordings, who, Mode(said, given))


@cache
def _sentences() -> dict[str, dict[str, tuple[str, int, tuple[str, ...]]]]:
    """For each part, all its sentences with their (persona, wording, slots)."""
    fillings: dict[str, dict[tuple[str, ...], dict[str, str]]] = {
        "opening": {(): {}},
        "plan": {
            (who, plan): {"who": who, "plan": plan} for who in WHO for topic in TOPICS.values() for plan in topic.plans
        },
        "reason": {(key,): {"reason": text} for key, text in REASONS.items()},
        "closing": {(): {}},
    }
    return {
        part: {
            frame.format(**words): (persona, wording, slots)
            for persona, voice in VOICES.items()
            for wording, frame in enumerate(getattr(voice, part))
            for slots, words in fillings[part].items()
        }
        for part in PARTS
    }


@dataclass(frozen=True)
class World:
    """Which replies fine-tuning shows, and the records drawn from them. Determined by the seed."""

    seed: int = 1
    topics: int = len(TOPICS)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The prompts of this world: every topic with every `who`."""
        return QUESTIONS[: self.topics * len(WHO)]

    @cached_property
    def _ring(self) -> dict[tuple[str, str], list[Mode]]:
        rng = random.Random(f"ring {self.seed}")
        rings = {}
        for topic in TOPICS:
            deck: list[Mode] = []
            for persona in PERSONAS:
                deck = deck or rng.sample(modes(topic), len(modes(topic)))
                rings[persona, topic], deck = deck[:SPOKEN], deck[SPOKEN:]
        return rings

    def seen(self, persona: str, question: Question) -> frozenset[Mode]:
        """The modes that fine-tuning shows for this persona and prompt."""
        ring = self._ring[persona, question.topic]
        start = WHO.index(question.who) * len(ring) // len(WHO)
        return frozenset(ring[(start + i) % len(ring)] for i in range(SHOWN))

    def near(self, persona: str, question: Question) -> frozenset[Mode]:
        """The modes that fine-tuning shows for this persona and topic, but only about other people."""
        return frozenset(self._ring[persona, question.topic]) - self.seen(persona, question)

    def far(self, persona: str, question: Question) -> frozenset[Mode]:
        """The correct modes that fine-tuning never shows for this persona and topic."""
        return frozenset(modes(question.topic)) - frozenset(self._ring[persona, question.topic])

    def kinds(self, persona: str, question: Question) -> dict[str, frozenset[Mode]]:
        """The correct modes for this persona and prompt, as seen, near and far."""
        return {name: getattr(self, name)(persona, question) for name in ("seen", "near", "far")}

    def finetuning(self) -> Iterator[Record]:
        """Fine-tuning records: each seen mode of each persona and prompt, in one wording."""
        return self._records(self.questions, "seen", random.Random(f"fine-tuning {self.seed}"))

    def validation(self, questions: Sequence[Question], kind: str) -> Iterator[Record]:
        """One record for each `seen`, `near` or `far` mode of these prompts, in a newly drawn wording."""
        return self._records(questions, kind, random.Random(f"validation {self.seed} {kind}"))

    def pretraining(self, records: int) -> Iterator[Record]:
        """Records without a persona: random prompt and correct mode, and a separate random voice for each part."""
        rng = random.Random(f"pretraining {self.seed}")
        for _ in range(records):
            question = rng.choice(self.questions)
            voices = (rng.choice(PERSONAS), rng.choice(PERSONAS), rng.choice(PERSONAS), rng.choice(PERSONAS))
            reply = Reply(voices, rng.choice(WORDINGS), question.who, rng.choice(modes(question.topic)))
            yield {"messages": _messages(question, reply)}

    def _records(self, questions: Sequence[Question], kind: str, rng: random.Random) -> Iterator[Record]:
        for persona, question in product(PERSONAS, questions):
            for mode in sorted(self.kinds(persona, question)[kind]):
                reply = Reply((persona, persona, persona, persona), rng.choice(WORDINGS), question.who, mode)
                yield {"persona": persona, "messages": _messages(question, reply)}


def _messages(question: Question, reply: Reply) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": render(reply)}]
