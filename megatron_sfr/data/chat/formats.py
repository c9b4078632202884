"""Formats of records: messages, ShareGPT and alpaca become turns of role and content; plain text is recognized.

- messages   {"messages": [{"role": "user", "content": ...}, ...], "system": ..., "tools": [...]}
- ShareGPT   {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
- alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[asked, answered], ...]}
- completion {"prompt": ..., "completion": ..., "system": ...}: strings, or lists of messages
- plain text {"text": ...}: pretraining data, no chat

Older names of OpenAI's API are read too: functions, function_call and the role function.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.storage.jsonl import Record, RecordError, read_records
from megatron_sfr.storage.user_files import parse_json, shown

TITLES = {
    "messages": "messages",
    "sharegpt": "ShareGPT",
    "alpaca": "alpaca",
    "completion": "prompt and completion",
    "text": "plain text",
}
FORMATS = ("messages", "sharegpt", "alpaca", "completion")  # those that hold chats
KEYS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "completion": "completion",
    "text": "text",
}
TRAINED = ("train", "loss", "weight")
"""Fields of a turn that say whether it is trained; `loss` is ms-swift's name of `train`."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that equal an absent one."""
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = ("images", "videos", "audios")
SHAREGPT_ROLES = (
    {"system": "system", "human": "user", "user": "user"}
    | dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant")
    | dict.fromkeys(("tool", "observation", "function", "function_response"), "tool")
)


def load_fields(record: Record) -> dict[str, Any]:
    """The JSON object of a record. RecordError if it is not one, or if a field occurs twice in one object."""
    twice: list[str] = []
    try:
        fields = parse_json(record.text, repeated=twice)
    except ValueError as error:
        raise RecordError(f"{error}; write one JSON object on each line") from error
    if not isinstance(fields, dict):
        raise RecordError('not a JSON object; write {"messages": [...]}')
    if twice:
        raise RecordError(f"the field {shown(twice[0])} occurs twice in one object; keep one of them")
    return fields


def format_of(fields: dict[str, Any]) -> str | None:
    """The format that the field names of a record belong to; None if there is none."""
    return next((name for name, key in KEYS.items() if fields.get(key) is not None), None)


def detect(path: Path) -> str:
    """The format of a file's first record that has one. "messages" if none has, so that errors name what is missing.

    ValueError for plain text.
    """
    for record in read_records(path):
        try:
            found = format_of(load_fields(record))
        except RecordError:
            continue
        if found == "text":
            raise ValueError(
                f"{path} holds plain text, which is pretraining data and no chat; "
                'use megatron-sfr prepare-text for it, or write records {"messages": [...]}'
            )
        if found is not None:
            return found
    return "messages"


def turns_of(fields: dict[str, Any], form: str) -> tuple[list[Any], list[Any] | None]:
    """The turns of a record as role and content, not yet checked, and the tools for the chat template."""
    found = format_of(fields)
    if fields.get(KEYS[form]) is None and found is not None:
        raise RecordError(
            f"the record is {TITLES[found]} in a file of {TITLES[form]}; keep each format in a separate file"
        )
    if kind := next((name for name in MEDIA if fields.get(name)), None):
        raise RecordError(f"the record has {kind}, and only text can be trained on; drop the record or the field")
    return plain_turns(with_system(fields, _turns_in(fields, form))), _tools(fields)


def _turns_in(fields: dict[str, Any], form: str) -> list[Any]:
    """The turns as the record has them, with role and content."""
    if form == "alpaca":
        return _alpaca(fields)
    if form == "completion":
        return _completion(fields)
    turns = fields.get(KEYS[form])
    if not isinstance(turns, list) or not turns:
        raise RecordError(f'no {KEYS[form]}; write "{KEYS[form]}": [{EXAMPLES[form]}, ...]')
    if form == "sharegpt":
        turns = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    return turns


EXAMPLES = {"messages": '{"role": "user", "content": ...}', "sharegpt": '{"from": "human", "value": ...}'}


def _sharegpt_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "from" not in turn:
        raise RecordError(
            f'turn {number} is not {{"from": ..., "value": ...}}; write it so, or name the list "messages"'
        )
    trained = {name: turn[name] for name in TRAINED if turn.get(name) is not None}
    known = ("from", "value", *trained)
    extra = sorted(name for name, value in turn.items() if name not in known and value not in EMPTY)
    if extra:
        raise RecordError(f"turn {number} has the field {shown(extra[0])}, which is not supported; remove it")
    who, value = turn["from"], turn.get("value")
    if who == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, number), **trained}
    role = SHAREGPT_ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise RecordError(f"turn {number} is from the unknown {shown(who)}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": value, **trained}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    try:
        calls = parse_json(value if isinstance(value, str) else "")
    except ValueError as error:
        raise RecordError(
            f'the call of turn {number} is not JSON; write "value": "{{\\"name\\": ..., \\"arguments\\": {{...}}}}"'
        ) from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _alpaca(fields: dict[str, Any]) -> list[Message]:
    instruction, more = fields.get("instruction"), fields.get("input")
    if not isinstance(instruction, str) or not instruction.strip():
        raise RecordError('no instruction; write {"instruction": ..., "output": ...}')
    if more is not None and not isinstance(more, str):
        raise RecordError("the input is not a string; write plain text, or leave the field out")
    if not isinstance(fields.get("output"), str):
        raise RecordError("the output is not a string; write the reply")
    turns: list[Message] = []
    history = fields.get("history")
    for pair in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError('the history is not a list of pairs; write "history": [["asked", "answered"], ...]')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = f"{instruction}\n{more}" if more and more.strip() else instruction
    return [*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]


def _completion(fields: dict[str, Any]) -> list[Any]:
    """The prompt's turns, of which none is trained, and the completion's: a string is one turn."""
    turns: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields.get(name)
        if isinstance(value, list) and value:
            turns += map(_context, value) if name == "prompt" else value
        elif isinstance(value, str):
            turns.append({"role": role, "content": value})
        else:
            raise RecordError(
                f'the {name} is not text; write {{"prompt": ..., "completion": ...}}, or a list of messages'
            )
    return turns


def _context(turn: Any) -> Any:
    """A turn of a prompt: a reply in it is not trained, unless it asks for it."""
    is_reply = isinstance(turn, dict) and turn.get("role") == "assistant"
    return turn | {"train": False} if is_reply and all(turn.get(name) is None for name in TRAINED) else turn


def plain_turns(turns: list[Any]) -> list[Any]:
    """Turns with the content as one text, and today's names: system for developer, tool and tool_calls for function."""
    return [_plain_turn(turn, number) if isinstance(turn, dict) else turn for number, turn in enumerate(turns, start=1)]


def _plain_turn(turn: Message, number: int) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if isinstance(role, str):
        turn = turn | {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    if turn.get("function_call") and not turn.get("tool_calls"):
        calls = [{"type": "function", "function": turn["function_call"]}]
        turn = turn | {"function_call": None, "tool_calls": calls}
    if isinstance(content, list):
        turn = turn | {"content": "".join(_part(part, number) for part in content)}
    if content is None and turn.get("role") == "system":
        turn = turn | {"content": ""}
    return turn


def _part(part: Any, number: int) -> str:
    """The text of a content part, as {"type": "text", "text": ...} or as a string."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        hint = "give it as reasoning_content" if kind in ("thinking", "reasoning") else "remove it"
        raise RecordError(f"message {number} has content of type {shown(kind)}; only text can be trained on: {hint}")
    return text


def with_system(fields: dict[str, Any], turns: list[Any]) -> list[Any]:
    """The turns after a system turn of the record's field `system`. Many files leave it empty if there is none."""
    text = fields.get("system")
    if not (text.strip() if isinstance(text, str) else text):
        return turns
    if not isinstance(text, str | list):
        raise RecordError(f"the system is {shown(text)}; write plain text, or leave the field out")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    is_system = first.get("role") in ("system", "developer")
    other = first.get("content")
    if is_system and other != text and (other.strip() if isinstance(other, str) else other):
        raise RecordError("the record has a field system and another system turn; keep one of them")
    return [{"role": "system", "content": text}, *(turns[1:] if is_system else turns)]


def _tools(fields: dict[str, Any]) -> list[Any] | None:
    """The tools, or the functions of older records, which are the same without their wrapping."""
    tools, functions = (_objects(fields.get(name), name) for name in ("tools", "functions"))
    if tools and functions:
        raise RecordError("the record has tools and functions; keep one of them")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def _objects(value: Any, name: str) -> list[Any]:
    """A list of objects, which some files hold as JSON in a string."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RecordError(f"the {name} are {error}; write a list of {name}") from error
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(f"the {name} are not a list of objects; write a list of {name}")
    return value


def has_tool_turns(messages: Sequence[Message]) -> bool:
    """Whether a turn calls tools or holds the answer of one."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
