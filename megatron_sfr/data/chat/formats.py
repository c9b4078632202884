"""Formats of records: messages, ShareGPT and alpaca become turns of role and content; plain text is recognized.

- messages   {"messages": [{"role": "user", "content": ...}, ...], "system": ..., "tools": [...]}
- ShareGPT   {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
- alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[asked, answered], ...]}
- completion {"prompt": ..., "completion": ..., "system": ...}: strings, or lists of messages
- xLAM       {"query": ..., "answers": [call, ...], "tools": [...]}: messages
- plain text {"text": ...}: pretraining data, no chat

The columns of some trainers and datasets have other names (RENAMED). turn_forms.py reads the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.chat_template import REASONING
from megatron_sfr.data.chat.tool_calls import Message, objects_of, tools_of
from megatron_sfr.data.chat.turn_forms import (
    EMPTY,
    TRAINED,
    calls_of,
    excludes,
    known_form,
    named_turns,
    plain_turns,
    unnamed_turns,
)
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
    {"input_text": "prompt", "output_text": "completion"},  # Vertex AI
    {"question": "prompt", "answer": "completion"},  # GSM8K
    {"query": "prompt", "answer": "completion"},  # CodeFeedback
    {"problem": "prompt", "generated_solution": "completion"},  # OpenMathReasoning
    {"problem": "prompt", "solution": "completion"},  # NuminaMath, Magicoder
)
"""Columns of other formats, and their names here. A record has the format if it has the first two columns."""
XLAM = ("query", "answers", "tools")
SYSTEM = ("system", "system_prompt")
BESIDE = ("context", "passage", "choices", "options")
"""Columns that belong to a question, as of SQuAD and MMLU."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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
    if all(fields.get(name) is not None for name in XLAM):
        return fields | _xlam(fields)
    known = [names for names in RENAMED if all(fields.get(name) is not None for name in list(names)[:2])]
    written = [names for names in known if not _is_blank(fields[list(names)[:2][-1]])]
    replies = list(dict.fromkeys(list(names)[:2][-1] for names in written))
    if any(fields[reply] != fields[replies[0]] for reply in replies):
        raise RecordError(f"the record has several replies, {' and '.join(replies)}; keep one of them")
    names = (written or known or [{}])[0]
    new = {names[name]: fields[name] for name in names if name in fields and _is_blank(fields.get(names[name]))}
    has_format = any((fields | new).get(key) is not None for key in KEYS.values())
    return fields | (new if has_format else unnamed_turns(fields))


def _xlam(fields: dict[str, Any]) -> dict[str, Any]:
    """A query and the calls that answer it, as messages and tools."""
    calls = calls_of(fields["answers"], "the field answers")
    if not calls:
        raise RecordError("the answers are empty; write the reply, or drop the record")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools_of(fields) or []]
    reply = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [{"role": "user", "content": fields["query"]}, reply], "tools": tools}


def detect(path: Path) -> str:
    """The format of a file's first record that has one. "messages" if none has, so that errors name what is missing.

    ValueError for plain text.
    """
    for record in read_records(path):
        try:
            fields = load_fields(record)
            found = format_of(fields)
        except RecordError:
            continue
        if found == "text" and "parent_id" in fields:
            raise ValueError(
                f"{path} holds the messages of trees (OASST), one in each record; write a record "
                '{"messages": [...]} for each path from a root to a reply'
            )
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
    turns = plain_turns(with_system(fields, _turns_in(fields, form)))
    return turns, None if _has_tools(turns, tools or []) else tools


def _has_tools(turns: Sequence[Any], tools: Sequence[dict[str, Any]]) -> bool:
    """Whether the system turn has the record's tools in <tools>, as Hermes's have: a template would repeat them."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    text = first.get("content") if first.get("role") == "system" else None
    names = [tool.get("function", tool) for tool in tools]
    names = [tool.get("name") if isinstance(tool, dict) else None for tool in names]
    if not isinstance(text, str) or "<tools>" not in text:
        return False
    return all(isinstance(name, str) and (f'"{name}"' in text or f"'{name}'" in text) for name in names)


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
    if form == "completion" and (name := next((name for name in BESIDE if fields.get(name) not in EMPTY), None)):
        raise RecordError(f"the record has {name} beside its question; write it in the question, or remove the field")
    given = {name: fields[name] for name in ("weight", "loss_mask") if fields.get(name) not in EMPTY}
    marks = {name: excludes(value if isinstance(value, list) else [value]) for name, value in given.items()}
    marks |= {name: excludes(fields.get(name)) for name in ("train", "loss")}  # a loss may also be a measured number
    if name := next((name for name, is_excluded in marks.items() if is_excluded), None):
        raise RecordError(
            f"the record has {name} {shown(fields[name])}, and all records are trained equally; leave the record "
            f"out, write {name if name in TRAINED else 'train'} to its replies, or remove the field"
        )
    check_variables(fields)


def check_variables(fields: dict[str, Any]) -> None:
    """RecordError for a record with variables of the template, which are the same for all records."""
    variables = fields.get("chat_template_kwargs")
    if isinstance(variables, dict) and (given := [name for name, value in variables.items() if value not in EMPTY]):
        raise RecordError(
            f"the record has the template variables {', '.join(given)}; keep records with equal ones in one file, and "
            "give --template-kwargs instead of the field chat_template_kwargs"
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
        known = known_form(fields, KEYS[form], _is_chat)
        raise RecordError(f'no {KEYS[form]}{known}; write "{KEYS[form]}": [{EXAMPLES[form]}, ...]')
    return named_turns(turns, form)


EXAMPLES = {"messages": '{"role": "user", "content": ...}', "sharegpt": '{"from": "human", "value": ...}'}


def _is_chat(fields: dict[str, Any]) -> bool:
    try:
        return format_of(fields) in FORMATS
    except RecordError:  # of a known format, with an error in it
        return True


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
