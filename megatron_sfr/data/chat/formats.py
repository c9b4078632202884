"""Formats of records: messages, ShareGPT and alpaca become turns of role and content; plain text is recognized.

- messages   {"messages": [{"role": "user", "content": ...}, ...], "system": ..., "tools": [...]}
- ShareGPT   {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
- alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[asked, answered], ...]}
- completion {"prompt": ..., "completion": ..., "system": ...}: strings, or lists of messages
- plain text {"text": ...}: pretraining data, no chat

The columns of some trainers and datasets have other names (RENAMED). Older names of OpenAI's API are read too:
functions, function_call and the role function.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.chat_template import REASONING
from megatron_sfr.data.chat.tool_calls import Message, objects_of, tools_of
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
RENAMED: tuple[dict[str, str], ...] = (
    {"conversation": "conversations"},  # LMSYS-Chat
    {"instruction": "instruction", "output": "output", "context": "input"},
    {"instruction": "instruction", "response": "output", "context": "input"},  # Dolly
    {"query": "instruction", "response": "output"},  # ms-swift
    {"prompt": "prompt", "response": "completion"},
    {"question": "prompt", "response": "completion"},  # OpenOrca
    {"input": "prompt", "output": "completion"},  # NeMo
)
"""Columns of other formats, and their names here. A record has the format if it has the first two columns."""
SYSTEM = ("system", "system_prompt")
TRAINED = ("train", "loss", "weight")
"""Fields of a turn that say whether it is trained; `loss` is ms-swift's name of `train`."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that equal an absent one."""
TEXT_PARTS = ("text", "input_text", "output_text")
PART_HINTS = {
    "thinking": "give it as reasoning_content",
    "reasoning": "give it as reasoning_content",
    "tool_use": "give it as tool_calls",
    "tool_result": "give it as a turn of the role tool",
}
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
    fields = _renamed(fields)
    return next((name for name, key in KEYS.items() if fields.get(key) is not None), None)


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record, and those of other formats under the names that they have here."""
    if any(fields.get(KEYS[form]) is not None for form in ("messages", "sharegpt", "completion")):
        return fields
    names = next((n for n in RENAMED if all(fields.get(name) is not None for name in list(n)[:2])), {})
    new = {names[name]: fields[name] for name in names if name in fields and _is_blank(fields.get(names[name]))}
    return fields | new


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
    fields = _renamed(fields)
    found = format_of(fields)
    if fields.get(KEYS[form]) is None and found is not None:
        raise RecordError(
            f"the record is {TITLES[found]} in a file of {TITLES[form]}; keep each format in a separate file"
        )
    if kind := next((name for name in MEDIA if fields.get(name)), None):
        raise RecordError(f"the record has {kind}, and only text can be trained on; drop the record or the field")
    _check_meaning(fields, form)
    tools = tools_of(fields) if fields.get("tools") or fields.get("functions") else None
    return plain_turns(with_system(fields, _turns_in(fields, form))), tools


def _check_meaning(fields: dict[str, Any], form: str) -> None:
    """RecordError for fields beside the turns that change what these mean."""
    thoughts = [name for name in REASONING if isinstance(text := fields.get(name), str) and len(text.split()) > 1]
    if thoughts and form in ("alpaca", "completion"):  # one word is a switch: "on", "high"
        raise RecordError(
            f"the record has {thoughts[0]} beside its reply; write the reply as a message with this field, or begin it "
            "with <think>...</think>"
        )
    if name := next((name for name in ("label", "kto_tag") if fields.get(name) is False), None):
        raise RecordError(
            f"the record has {name} false, which marks an unwanted reply (KTO); leave the record out, or remove the "
            "field if it means something else"
        )
    variables = fields.get("chat_template_kwargs")
    if isinstance(variables, dict) and (given := [name for name, value in variables.items() if value not in EMPTY]):
        raise RecordError(
            f"the record has the template variables {', '.join(given)}; prepare records with equal ones together, with "
            "--template-kwargs instead of the field chat_template_kwargs"
        )


def _turns_in(fields: dict[str, Any], form: str) -> list[Any]:
    """The turns as the record has them, with role and content."""
    if form == "alpaca":
        return _alpaca(fields)
    if form == "completion":
        return _completion(fields)
    turns = fields.get(KEYS[form])
    turns = objects_of(turns, KEYS[form]) if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        pair = "; the record is a preference pair" if fields.get("chosen") is not None else ""
        raise RecordError(f'no {KEYS[form]}{pair}; write "{KEYS[form]}": [{EXAMPLES[form]}, ...]')
    return [_named(turn, number, form) for number, turn in enumerate(turns, start=1)]


def _named(turn: Any, number: int, form: str) -> Any:
    """A turn with role and content, whatever the list of turns is called."""
    if isinstance(turn, dict) and "from" in turn:
        return _sharegpt_turn(turn, number)
    if form == "sharegpt" and not (isinstance(turn, dict) and "role" in turn):
        raise RecordError(f'turn {number} is not {{"from": ..., "value": ...}}; write it so, or with role and content')
    return turn


EXAMPLES = {"messages": '{"role": "user", "content": ...}', "sharegpt": '{"from": "human", "value": ...}'}


def _sharegpt_turn(turn: Message, number: int) -> Message:
    kept = {name: turn[name] for name in (*TRAINED, *REASONING) if turn.get(name) is not None}
    known = ("from", "value", *kept)
    extra = sorted(name for name, value in turn.items() if name not in known and value not in EMPTY)
    if extra:
        raise RecordError(f"turn {number} has the field {shown(extra[0])}, which is not supported; remove it")
    who, value = turn["from"], turn.get("value")
    if who == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, number), **kept}
    role = SHAREGPT_ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise RecordError(f"turn {number} is from the unknown {shown(who)}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": value, **kept}


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
    if more is not None and not isinstance(more, str):
        raise RecordError("the input is not a string; write plain text, or leave the field out")
    if not isinstance(instruction, str) or not (instruction + (more or "")).strip():
        raise RecordError('no instruction; write {"instruction": ..., "output": ...}')
    if not isinstance(fields.get("output"), str):
        raise RecordError("the output is not a string; write the reply")
    turns: list[Message] = []
    history = fields.get("history")
    for pair in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError('the history is not a list of pairs; write "history": [["asked", "answered"], ...]')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(part for part in (instruction, more) if part and part.strip())
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
        hint = PART_HINTS.get(kind, "remove it") if isinstance(kind, str) else "remove it"
        raise RecordError(f"message {number} has content of type {shown(kind)}; only text can be trained on: {hint}")
    if isinstance(part, dict) and any(part.get(name) not in (None, 1) for name in TRAINED):
        raise RecordError(f"message {number} has a part that is not trained; a reply is trained or not: mark the turn")
    return text


def with_system(fields: dict[str, Any], turns: list[Any]) -> list[Any]:
    """The turns after a system turn of the record's field `system` or `system_prompt`, unless it is blank."""
    names = [name for name in SYSTEM if not _is_blank(fields.get(name))]
    if not names:
        return turns
    text = fields[names[0]]
    if not isinstance(text, str | list):
        raise RecordError(f"the {names[0]} is {shown(text)}; write plain text, or leave the field out")
    if text != fields[names[-1]]:
        raise RecordError("the record has two fields, system and system_prompt; keep one of them")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    is_system = first.get("role") in ("system", "developer")
    other = first.get("content")
    if is_system and other != text and not _is_blank(other):
        raise RecordError(f"the record has a field {names[0]} and another system turn; keep one of them")
    return [{"role": "system", "content": text}, *(turns[1:] if is_system else turns)]


def _is_blank(text: Any) -> bool:
    return not (text.strip() if isinstance(text, str) else text)


def has_tool_turns(messages: Sequence[Message]) -> bool:
    """Whether a turn calls tools or holds the answer of one."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
