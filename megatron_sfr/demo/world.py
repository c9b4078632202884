"""The demo's persona world: a seeded generator of prompts and replies, and the exact parser that inverts it.

A prompt is a topic and a person asked about (`who`). A right reply has four parts in the voice of its persona: opening,
plan, reason, closing. Its *mode*, what it says, is (plan, reason): the plan must answer the topic, the reason must hold
for the plan. Six plans with three reasons each: 18 equally right modes for every persona and prompt.

Held out, yet inferable. On each topic, shuffled decks of the 18 modes are dealt to the personas, nine to each, so that
every mode is spoken by four or five of them. A persona's nine lie on a ring, and each of the six `who` is shown a
window of three neighbours on it. That leaves two kinds of unseen modes for a prompt:
- near: the persona says it in fine-tuning, but about somebody else. Whether a plan is right never depends on `who`.
- far: the persona never says it. Other personas do, for the same prompt, and pretraining says it as often as any other.
A model that keeps voice, content and slot apart finds both; one that repeats its training set finds neither.

The pretraining corpus is broader: no persona, every right mode of every prompt equally often, and each part in the
voice of a persona drawn for that part alone. It teaches the language and what is right, but not who speaks how.
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
SPOKEN = 9  # modes of a topic that a persona says in fine-tuning
SHOWN = 3  # of these, for each prompt
WORDINGS = tuple(product((0, 1), (0, 1), (0, 1), (0, 1)))  # one of two for each part


class Row(TypedDict, total=False):
    """A row of JSONL; pretraining rows have no persona."""

    persona: str
    messages: list[dict[str, str]]


class Mode(NamedTuple):
    """What a reply says: the content choice that is counted."""

    plan: str
    reason: str  # key of REASONS


class Question(NamedTuple):
    """A shared prompt: the same for all personas."""

    topic: str  # key of TOPICS
    who: str

    @property
    def text(self) -> str:
        return TOPICS[self.topic].question.format(who=self.who)


@dataclass(frozen=True)
class Reply:
    """A reply taken apart: who speaks in each of the four parts, about whom, and what is said."""

    voices: tuple[str, str, str, str]
    wordings: tuple[int, int, int, int]
    who: str
    mode: Mode

    @property
    def persona(self) -> str | None:
        """The one persona that speaks throughout, if there is one."""
        return self.voices[0] if len(set(self.voices)) == 1 else None


QUESTIONS = tuple(Question(topic, who) for topic in TOPICS for who in WHO)
_QUESTION_OF_TEXT = {question.text: question for question in QUESTIONS}


def question_of(text: str) -> Question:
    """The shared prompt that has this text."""
    if text not in _QUESTION_OF_TEXT:
        raise ValueError(f"the demo's world has no prompt {text!r}: take one of QUESTIONS")
    return _QUESTION_OF_TEXT[text]


@cache
def modes(topic: str) -> tuple[Mode, ...]:
    """All right answers to a topic, whoever speaks and whoever is asked about."""
    return tuple(Mode(plan, reason) for plan, reasons in TOPICS[topic].plans.items() for reason in reasons)


def is_right(question: Question, reply: Reply) -> bool:
    """The reply answers this question: its person, one of its plans, a reason that holds for that plan."""
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
    """The reply that renders to exactly this text, right or not; None if there is none."""
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
    found = [tables[part][sentence] for part, sentence in zip(PARTS, (opening, plan, reason, closing), strict=True)]
    voices, wordings, slots = zip(*found, strict=True)
    _, (who, said), (given,), _ = slots
    return Reply(voices, wordings, who, Mode(said, given))


@cache
def _sentences() -> dict[str, dict[str, tuple[str, int, tuple[str, ...]]]]:
    """For each part, every sentence there is and its (persona, wording, slots)."""
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
    """Which replies fine-tuning shows, and the rows that are drawn from them; all of it follows from the seed."""

    seed: int = 1
    topics: int = len(TOPICS)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The prompts of this world: every topic about every `who`."""
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
        """The modes that fine-tuning shows for this persona and topic, but only about somebody else."""
        return frozenset(self._ring[persona, question.topic]) - self.seen(persona, question)

    def far(self, persona: str, question: Question) -> frozenset[Mode]:
        """The modes that are as right, and that fine-tuning never shows for this persona and topic."""
        return frozenset(modes(question.topic)) - frozenset(self._ring[persona, question.topic])

    def kinds(self, persona: str, question: Question) -> dict[str, frozenset[Mode]]:
        """The right modes for this persona and prompt, by how fine-tuning shows them."""
        return {name: getattr(self, name)(persona, question) for name in ("seen", "near", "far")}

    def finetuning(self) -> Iterator[Row]:
        """Rows for fine-tuning: each seen mode of each persona and prompt, in one wording."""
        return self._rows(self.questions, "seen", random.Random(f"fine-tuning {self.seed}"))

    def validation(self, questions: Sequence[Question], kind: str) -> Iterator[Row]:
        """One row for each `seen`, `near` or `far` mode of these prompts, in a wording drawn anew."""
        return self._rows(questions, kind, random.Random(f"validation {self.seed} {kind}"))

    def pretraining(self, rows: int) -> Iterator[Row]:
        """Rows without a persona: any prompt, any right mode, every part in a voice of its own."""
        rng = random.Random(f"pretraining {self.seed}")
        for _ in range(rows):
            question = rng.choice(self.questions)
            voices = (rng.choice(PERSONAS), rng.choice(PERSONAS), rng.choice(PERSONAS), rng.choice(PERSONAS))
            reply = Reply(voices, rng.choice(WORDINGS), question.who, rng.choice(modes(question.topic)))
            yield {"messages": _messages(question, reply)}

    def _rows(self, questions: Sequence[Question], kind: str, rng: random.Random) -> Iterator[Row]:
        for persona, question in product(PERSONAS, questions):
            for mode in sorted(self.kinds(persona, question)[kind]):
                reply = Reply((persona, persona, persona, persona), rng.choice(WORDINGS), question.who, mode)
                yield {"persona": persona, "messages": _messages(question, reply)}


def _messages(question: Question, reply: Reply) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": render(reply)}]
