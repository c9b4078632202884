"""Formats of records: messages, ShareGPT and alpaca become turns of role and content; plain text is recognized.

- messages   {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}
- ShareGPT   {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
- alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[asked, answered], ...]}
- completion {"prompt": ..., "completion": ..., "system": ...}: strings, or lists of messages
- plain text {"text": ...}: pretraining data, no chat
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
SHAREGPT_ROLES = (
    {"system": "system", "human": "user", "user": "user"}
    | dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant")
    | dict.fromkeys(("tool", "observation", "function", "function_response"), "tool")
)


def load_fields(record: Record) -> dict[str, Any]:
    """The JSON object of a record. RecordError if it is not one."""
    try:
        fields = parse_json(record.text)
    except ValueError as error:
        raise RecordError(f"{error}; write one JSON object on each line") from error
    if not isinstance(fields, dict):
        raise RecordError('not a JSON object; write {"messages": [...]}')
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
    if form == "alpaca":
        return _alpaca(fields), None
    if form == "completion":
        return _plain_turns(_completion(fields)), _tools(fields.get("tools"))
    turns = fields.get(KEYS[form])
    if not isinstance(turns, list) or not turns:
        raise RecordError(f'no {KEYS[form]}; write "{KEYS[form]}": [{EXAMPLES[form]}, ...]')
    if form == "sharegpt":
        turns = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, start=1)]
        turns = _system(fields) + turns
    return _plain_turns(turns), _tools(fields.get("tools"))


EXAMPLES = {"messages": '{"role": "user", "content": ...}', "sharegpt": '{"from": "human", "value": ...}'}


def _sharegpt_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "from" not in turn:
        raise RecordError(
            f'turn {number} is not {{"from": ..., "value": ...}}; write it so, or name the list "messages"'
        )
    trained = {name: turn[name] for name in ("train", "weight") if turn.get(name) is not None}
    known = ("from", "value", *trained)
    extra = sorted(name for name, value in turn.items() if name not in known and value is not None)
    if extra:
        raise RecordError(f"turn {number} has the field {shown(extra[0])}, which is not supported; remove it")
    who, value = turn["from"], turn.get("value")
    if who == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, number), **trained}
    if not isinstance(who, str) or who not in SHAREGPT_ROLES:
        raise RecordError(f"turn {number} is from the unknown {shown(who)}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[who], "content": value, **trained}


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
    turns = _system(fields)
    history = fields.get("history")
    for pair in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError('the history is not a list of pairs; write "history": [["asked", "answered"], ...]')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = f"{instruction}\n{more}" if more and more.strip() else instruction
    return [*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]


def _completion(fields: dict[str, Any]) -> list[Any]:
    """The prompt's turns and the completion's: a string is one turn."""
    turns: list[Any] = _system(fields)
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields.get(name)
        if isinstance(value, list) and value:
            turns += value
        elif isinstance(value, str):
            turns.append({"role": role, "content": value})
        else:
            raise RecordError(
                f'the {name} is not text; write {{"prompt": ..., "completion": ...}}, or a list of messages'
            )
    return turns


def _plain_turns(turns: list[Any]) -> list[Any]:
    """Turns with the content as one text and without the role `developer`, which is the system's newer name."""
    return [_plain_turn(turn, number) if isinstance(turn, dict) else turn for number, turn in enumerate(turns, start=1)]


def _plain_turn(turn: Message, number: int) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if role == "developer":
        turn = turn | {"role": "system"}
    if isinstance(content, list):
        turn = turn | {"content": "".join(_part(part, number) for part in content)}
    return turn


def _part(part: Any, number: int) -> str:
    """The text of a content part, as {"type": "text", "text": ...} or as a string."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RecordError(f"message {number} has content of type {shown(kind)}; only text can be trained on: remove it")
    return text


def _system(fields: dict[str, Any]) -> list[Message]:
    """The system turn of a record's field `system`. Many files leave it empty if there is none."""
    text = fields.get("system")
    return [] if text is None or text == "" else [{"role": "system", "content": text}]


def _tools(tools: Any) -> list[Any] | None:
    """A list of tools, which some files hold as JSON in a string."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise RecordError(f"the tools are {error}; write a list of tools") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("the tools are not a list of objects; write a list of tools")
    return tools


def has_tool_turns(messages: Sequence[Message]) -> bool:
    """Whether a turn calls tools or holds the answer of one."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
