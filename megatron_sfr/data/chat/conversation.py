"""Conversations: what a row must look like in each format, its persona, and its tokens with an exact assistant mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat.formats import detect, load_fields, turns_of
from megatron_sfr.data.chat.loss_mask import reply_spans
from megatron_sfr.data.chat.tool_calls import Message, strings_of
from megatron_sfr.storage.jsonl import BadRow, Row, RowError, read_rows
from megatron_sfr.storage.user_files import shown

ROLES = ("system", "user", "assistant", "tool")
# A field that is not here changes what a turn means: dropping it in silence would be a guess.
FIELDS = {"assistant": {"tool_calls"}, "tool": {"name", "tool_call_id"}}


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends on an assistant turn; a persona has become its system turn where there was none."""

    source: str
    line: int
    messages: list[Message]
    persona: str | None
    tools: list[Any] | None = None  # as the chat template takes them


@dataclass(frozen=True)
class Encoded:
    """Token ids [n] (int32), loss mask [n] (uint8, 1 = predict this token), and one [start, end) for each reply.

    The last supervised token of a reply is its end-of-turn token.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    replies: tuple[tuple[int, int], ...]


def read_conversations(path: Path, on_bad: Callable[[BadRow], None] | None = None) -> Iterator[Conversation]:
    """The conversations of a file. A bad row raises ValueError `file:line: reason`, or goes to `on_bad`."""
    form = detect(path)
    for row in read_rows(path):
        try:
            yield parse_row(row, form)
        except RowError as error:
            bad = BadRow(row, str(error))
            if on_bad is None:
                raise ValueError(str(bad)) from error
            on_bad(bad)


def parse_row(row: Row, form: str = "messages", persona_key: str = "persona") -> Conversation:
    """The conversation of a row; RowError says what is wrong with it."""
    fields = load_fields(row)
    turns, tools = turns_of(fields, form)
    messages = _messages(turns)
    for text in strings_of(tools):
        check_text(text, "a text of the tools")
    persona = fields.get(persona_key)
    if persona is not None:
        check_text(persona, f"the {persona_key}")
        if not persona.strip():
            raise RowError(f"the {persona_key} is blank; name it, or leave the field out")
        persona = persona.strip()
        if messages[0]["role"] != "system":
            messages = [persona_turn(persona), *messages]
    return Conversation(row.source, row.line, messages, persona, tools)


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
    ids, replies = reply_spans(conversation.messages, tokenizer, conversation.tools)
    mask = np.zeros(len(ids), np.uint8)
    for start, end in replies:
        mask[start:end] = 1
    return Encoded(np.asarray(ids, np.int32), mask, tuple(replies))


def _messages(messages: list[Any]) -> list[Message]:
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise RowError(f"the last turn is the {roles[-1]}'s; end the conversation on an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("the first assistant turn answers no user turn; begin with a user turn")
    # Templates test for the fields that they know: what is null or empty is as good as absent.
    return [{k: v for k, v in message.items() if k == "content" or v not in (None, [])} for message in messages]


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise RowError(f'message {number} is not an object; write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {number} has the unknown role {shown(role)}; roles are {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise RowError(f"message {number} is a system turn; a system turn comes first or not at all")
    known = {"role", "content"} | FIELDS.get(role, set())
    if extra := sorted(name for name, value in message.items() if name not in known and value is not None):
        raise RowError(f"message {number} has the field {shown(extra[0])}, which is not supported; remove it")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls:
        _check_calls(calls, number)
    for text in strings_of([calls, message.get("name"), message.get("tool_call_id")]):
        check_text(text, f"a text of message {number}")
    if not (calls and content is None):
        check_text(content, f"the content of message {number}")
    if role == "assistant" and not calls and not str(content).strip():
        raise RowError(f"message {number} is an empty reply; write the reply or drop the row")


def _check_calls(calls: Any, number: int) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(
                f"message {number} has a tool call without the name of a function; "
                'write "tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
            )
        if not isinstance(function.get("arguments"), dict | str):
            raise RowError(f'message {number} has a tool call without arguments; write "arguments": {{...}}')


def check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise RowError(f"{what} is not a string; write plain text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} has half of a surrogate pair; write the character itself") from error
