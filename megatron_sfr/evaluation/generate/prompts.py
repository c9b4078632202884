"""Prompts and reference replies from JSONL, grouped so that personas share a prompt."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.conversation import (
    ROLES,
    Conversation,
    check_reasoning,
    check_text,
    prompt_of,
    read_conversations,
)
from megatron_sfr.data.chat.formats import check_variables, load_fields, with_system
from megatron_sfr.data.chat.rendered_turns import reasoning_of, with_persona
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.data.chat.turn_forms import plain_turns
from megatron_sfr.storage.jsonl import Record, read_records
from megatron_sfr.storage.user_files import shown

TURN = ("role", "content", "reasoning_content")
NO_TOOLS = "tools are not sampled; leave this record out"


@dataclass(frozen=True)
class Prompt:
    """A prompt for one persona: the turns before the reply, including the persona's system turn.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.Prompt((("system", "You are a poet."), ("user", "How was your day?")), persona="poet").question
        'How was your day?'
    """

    messages: tuple[tuple[str, ...], ...]
    """(role, content), or (role, content, reasoning) of a reply that has reasoning beside its content."""
    persona: str | None = None
    """Who answers. It is a key of the random numbers; the turns have to name it themselves."""

    @property
    def shared(self) -> str:
        """A key of the prompt without its persona: equal for prompts that differ only in the system turn."""
        return _digest([turn for turn in self.messages if turn[0] != "system"]).hex()[:12]

    @property
    def key(self) -> int:
        """A 48-bit key of persona and turns, which selects the random numbers of the replies."""
        return int.from_bytes(_digest([self.persona, self.messages])[:6])

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.messages[-1][1]

    def turns(self) -> list[Message]:
        return [dict(zip(TURN, turn, strict=False)) for turn in self.messages]


@dataclass(frozen=True)
class NamedPrompt(Prompt):
    """A prompt of which a record of `generate` gives the last user turn and the name that personas share."""

    name: str = ""

    @property
    def shared(self) -> str:
        return self.name


@dataclass(frozen=True)
class Asked:
    """A prompt and its reference replies."""

    prompt: Prompt
    references: list[Conversation] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [conversation.messages[-1]["content"] for conversation in self.references]


def ask(text: str, persona: str | None = None, persona_as: str = "system") -> Prompt:
    """A prompt of one user turn; persona_as as in `TemplateOptions`."""
    return _prompt([{"role": "user", "content": text}], persona, persona_as)


def group(conversations: Iterable[Conversation], persona_as: str = "system") -> list[Asked]:
    """One entry for each (prompt, persona) in order of appearance, with all its replies."""
    found: dict[Prompt, Asked] = {}
    for conversation in conversations:
        if conversation.tools or any("tool_calls" in message for message in conversation.messages):
            raise ValueError(f"{conversation.source}:{conversation.line}: {NO_TOOLS}")
        prompt = _prompt(prompt_of(conversation.messages), conversation.persona, persona_as)
        found.setdefault(prompt, Asked(prompt)).references.append(conversation)
    return list(found.values())


def read_asked(path: Path, persona_as: str = "system") -> list[Asked]:
    """Prompts with their references, from a file of conversations."""
    return group(read_conversations(path, persona_as=persona_as), persona_as)


def read_prompts(path: Path, persona_as: str = "system") -> list[Prompt]:
    """The distinct prompts of a file: `{"prompt": text}` or `{"messages": [...]}`, with an optional persona and system.

    A reply at the end of a conversation is dropped. Raises ValueError `file:line: reason`.
    """
    return list(dict.fromkeys(prompt for _, _, prompt in _records(path, persona_as)))


def read_questions(path: Path, persona_as: str = "system") -> list[Asked]:
    """The distinct prompts of a file as `generate` reads it, with the real replies of records that end on one.

    Raises:
        ValueError: `file:line: reason`, or the file has no prompts.
    """
    found: dict[Prompt, Asked] = {}
    for record, fields, prompt in _records(path, persona_as):
        entry = found.setdefault(prompt, Asked(prompt))
        turns = plain_turns(fields.get("messages") or [])
        last = turns[-1] if turns else {}
        if last.get("role") == "assistant":
            messages = [*prompt.turns(), last]
            entry.references.append(Conversation(record.source, record.line, messages, prompt.persona))
    return list(found.values())


def _records(path: Path, persona_as: str) -> Iterator[tuple[Record, dict[str, Any], Prompt]]:
    """The records of a file with their fields and prompts. ValueError if there are none."""
    is_empty = True
    for record in read_records(path):
        is_empty = False
        try:
            fields = load_fields(record)
            if fields.get("tools") or fields.get("functions"):
                raise ValueError(NO_TOOLS)
            check_variables(fields)
            prompt = prompt_from(fields, persona_as)
        except ValueError as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
        yield record, fields, prompt
    if is_empty:
        raise ValueError(f'{path} has no prompts; write one {{"prompt": "..."}} a line')


def limit(asked: Sequence[Asked], shared_prompts: int) -> list[Asked]:
    """The entries of at most this many shared prompts, evenly spaced over the order of appearance."""
    kept = set(evenly_spaced(list(dict.fromkeys(entry.prompt.shared for entry in asked)), shared_prompts))
    return [entry for entry in asked if entry.prompt.shared in kept]


def evenly_spaced[T](items: Sequence[T], most: int) -> list[T]:
    """At most this many of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def prompt_from(fields: Any, persona_as: str) -> Prompt:
    """The prompt of a record, which has either prompt or messages. Raises ValueError with the reason."""
    turns = _turns_of(fields)
    for number, turn in enumerate(turns if isinstance(turns, list) else [turns], start=1):
        well_formed = isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        if well_formed and turn.get("tool_calls"):
            raise ValueError(NO_TOOLS)
        if not well_formed or not (turn["content"].strip() or turn["role"] == "system"):
            raise ValueError(f"{shown(turn)} is not a turn; write a role ({', '.join(ROLES)}) and its text")
        check_reasoning(turn, number)
    persona = fields.get("persona")
    if persona is not None and (not isinstance(persona, str) or not persona.strip()):
        raise ValueError("the persona is not text; name it, or leave the field out")
    if not isinstance(turns, list):
        raise ValueError('messages is not a list; write {"messages": [{"role": "user", "content": "..."}]}')
    for text in [persona or "", *(turn["content"] for turn in turns)]:
        check_text(text, "the text")
    asked = prompt_of(turns) if turns and turns[-1]["role"] == "assistant" else turns
    if not asked or asked[-1]["role"] != "user":
        raise ValueError("no user turn to reply to; end the prompt on one")
    return _prompt(asked, persona and persona.strip(), persona_as)


def _turns_of(fields: Any) -> Any:
    """The turns of a record, not yet checked. The field `system` and content in parts are as in `prepare`."""
    given = [name for name in ("prompt", "messages") if isinstance(fields, dict) and fields.get(name) is not None]
    if len(given) == 2:
        raise ValueError("the record has prompt and messages; keep one of them")
    if not given:
        raise ValueError('not a prompt; write {"prompt": "..."} or {"messages": [...]}')
    turns = fields[given[0]]
    if given == ["prompt"] and not isinstance(turns, list):
        turns = [{"role": "user", "content": turns}]
    return plain_turns(with_system(fields, turns)) if isinstance(turns, list) else turns


def _prompt(messages: Sequence[Message], persona: str | None, persona_as: str) -> Prompt:
    messages = with_persona(messages, persona, persona_as)
    return Prompt(tuple(map(_turn, messages)), persona)


def _turn(message: Message) -> tuple[str, ...]:
    reasoning = reasoning_of(message)[0] if message["role"] == "assistant" else ""
    return (message["role"], message["content"], *([reasoning] if reasoning else []))


def _digest(content: object) -> bytes:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).digest()
