"""Conversations: what a row of JSONL must look like, its persona, and its token ids with an exact assistant mask.

A row is `{"messages": [{"role": ..., "content": ...}, ...], "persona": ...}`; other fields of the row are not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.template import RowError, reply_spans

ROLES = ("system", "user", "assistant")

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One line of a file, as it stands there."""

    source: str
    line: int
    text: bytes


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, with the reason."""

    row: Row
    reason: str

    def __str__(self) -> str:
        return f"{self.row.source}:{self.row.line}: {self.reason}"


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends on an assistant turn; a persona has become its system turn where there was none."""

    source: str
    line: int
    messages: list[Message]
    persona: str | None


@dataclass(frozen=True)
class Encoded:
    """Token ids [n] (int32), loss mask [n] (uint8, 1 = predict this token), and one [start, end) for each reply.

    The last supervised token of a reply is its end-of-turn token.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    replies: tuple[tuple[int, int], ...]


def read_conversations(path: Path, on_bad: Callable[[BadRow], None] | None = None) -> Iterator[Conversation]:
    """The conversations of a JSONL file. A bad row raises ValueError `file:line: reason`, or goes to `on_bad`."""
    for row in read_rows(path):
        try:
            yield parse_row(row)
        except RowError as error:
            bad = BadRow(row, str(error))
            if on_bad is None:
                raise ValueError(str(bad)) from error
            on_bad(bad)


def read_rows(path: Path) -> Iterator[Row]:
    """The lines of a file that are not blank, numbered from 1, without a byte order mark."""
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            text = text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            if text.strip():
                yield Row(str(path), line, text)


def parse_row(row: Row) -> Conversation:
    """The conversation of a row; RowError says what is wrong with it."""
    try:
        fields = json.loads(row.text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON ({error}); write one JSON object a line") from error
    if not isinstance(fields, dict):
        raise RowError('not a JSON object; write {"messages": [...]}')
    messages = _messages(fields.get("messages"))
    persona = fields.get("persona")
    if persona is not None:
        _check_text(persona, "the persona")
        if not persona.strip():
            raise RowError("the persona is blank; name it, or leave the field out")
        persona = persona.strip()
        if messages[0]["role"] != "system":
            messages = [persona_turn(persona), *messages]
    return Conversation(row.source, row.line, messages, persona)


def persona_turn(persona: str) -> Message:
    """The system turn of a persona: whole sentences are used as they stand, a name or a phrase is put into one."""
    text = persona.strip()
    is_prose = "\n" in text or text.endswith((".", "!", "?", "。", "！", "？", "…"))
    return {"role": "system", "content": text if is_prose else f"Answer in this persona: {text}."}


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Everything before the last assistant turn."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return list(messages[:last])


def encode(conversation: Conversation, tokenizer: Any) -> Encoded:
    """The conversation in the tokenizer's chat template, with loss on what the assistant writes and on nothing else.

    Raises RowError where no exact mask exists.
    """
    ids, replies = reply_spans(conversation.messages, tokenizer)
    mask = np.zeros(len(ids), np.uint8)
    for start, end in replies:
        mask[start:end] = 1
    return Encoded(np.asarray(ids, np.int32), mask, tuple(replies))


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise RowError('no messages; write "messages": [{"role": "user", "content": ...}, ...]')
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise RowError(f"the last turn is the {roles[-1]}'s; end the conversation on an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("the first assistant turn answers no user turn; begin with a user turn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise RowError(f'message {number} is not an object; write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {number} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise RowError(f"message {number} is a system turn; a system turn comes first or not at all")
    _check_text(message.get("content"), f"the content of message {number}")
    if role == "assistant" and not message["content"].strip():
        raise RowError(f"message {number} is an empty reply; write the reply or drop the row")
    # A field such as tool_calls or weight changes what the turn means: dropping it in silence would be a guess.
    extra = sorted(name for name, value in message.items() if name not in ("role", "content") and value is not None)
    if extra:
        raise RowError(f"message {number} has the field {extra[0]!r}, which is not supported; remove it")


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise RowError(f"{what} is not a string; write plain text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} has half of a surrogate pair; write the character itself") from error
