"""Tool calls and tool turns in a chat template: that it writes them, and where a reply that calls tools ends.

A call may hold control tokens of the template's own: Mistral's [TOOL_CALLS] and [ARGS], Gemma 4's quotes, DeepSeek's
end of the calls. So the first one is not its end. The same conversation is rendered once more with a mark in place of
every text: a mark that is missing tells what the template drops, and the end of a turn is behind its marks. As no text
of ours holds a control token, the control tokens of both renderings stand in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import cut, parse_json

Message = dict[str, Any]


def tools_of(fields: dict[str, Any]) -> list[Any] | None:
    """The tools, Anthropic's in OpenAI's form, or the functions of older records, which are tools without wrapping."""
    tools, functions = (objects_of(fields.get(name), name) for name in ("tools", "functions"))
    tools = [_of_anthropic(tool) if "input_schema" in tool else tool for tool in tools]
    if tools and functions:
        raise RecordError("the record has tools and functions; keep one of them")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def _of_anthropic(tool: dict[str, Any]) -> dict[str, Any]:
    own = {name: tool[name] for name in ("name", "description") if name in tool} | {"parameters": tool["input_schema"]}
    more = {name: value for name, value in tool.items() if name not in ("type", "cache_control", "input_schema")}
    return {"type": "function", "function": own | more}


def objects_of(value: Any, name: str) -> list[Any]:
    """A list of objects. Some files hold it, or each object of it, as JSON in a string."""
    try:
        value = parse_json(value) if isinstance(value, str) and value.strip() else value
        if isinstance(value, list):
            value = [parse_json(item) if isinstance(item, str) else item for item in value]
    except ValueError as error:
        raise RecordError(f"the {name} are {error}; write a list") from error
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(f"the {name} are not a list of objects; write a list of them")
    return value


def check_tools_written(tools: Sequence[Any], prompt: str, without: str) -> None:
    """RecordError unless a prompt has the record's tools. without: the prompt for the same turns without tools."""
    if prompt == without:
        raise RecordError(
            "the chat template does not write the record's tools; use a template that does, or leave them out"
        )
    for tool in tools:
        function = tool.get("function", tool)
        given = (function.get(key) for key in ("name", "description")) if isinstance(function, dict) else ()
        texts = [text for text in given if isinstance(text, str) and text]
        if texts and all(prompt.count(text) <= without.count(text) for text in texts):
            form = "the function alone" if "function" in tool else '{"type": "function", "function": {...}}'
            raise RecordError(f"the chat template does not write the tool {cut(texts[0])!r}; write tools as {form}")


def check_calls(calls: Any, number: int) -> None:
    """RecordError unless the tool calls of a message have names and arguments."""
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RecordError(
                f"message {number} has a tool call without the name of a function; "
                'write "tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
            )
        if not isinstance(function.get("arguments"), dict | str):
            raise RecordError(f'message {number} has a tool call without arguments; write "arguments": {{...}}')


def ends_of_calls(
    messages: Sequence[Message],
    text: str,
    render: Callable[[Sequence[Message]], str],
    control: re.Pattern[str],
    plain_end: str,
) -> dict[int, re.Match[str] | None]:
    """The end token in `text` of each reply that calls tools, by the reply's index among the replies, from 0.

    None if it cannot be told from the turn that follows. plain_end: the token that ends replies without calls.
    RecordError where the template drops something, or writes no end token.
    """
    copy, marks = _marked(messages)
    outline = render(copy)
    _check_all_written(messages, marks, outline)
    _check_not_quoted(copy, outline)
    tokens = list(control.finditer(text))
    names = [token[0] for token in tokens]
    if control.findall(outline) != names:  # the template may quote what is a text and not what is a number
        copy, marks = _marked(messages, texts_only=True)
        outline = render(copy)
    if control.findall(outline) != names:
        raise RecordError(
            "the chat template writes other control tokens for other texts, so the end of a tool call cannot be told; "
            "use another template, or leave tools out of the record"
        )
    ends = dict[int, re.Match[str] | None]()
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for reply, turn in enumerate(replies):
        if messages[turn].get("tool_calls"):
            last = _last_mark(outline, marks[turn])
            following = min((outline.index(mark) for own in marks[turn + 1 :] for mark in own), default=len(outline))
            first = len(control.findall(outline, 0, last))
            after = control.findall(outline, last, following)
            if not after:
                raise RecordError(
                    f"the chat template writes no control token after the tool calls of message {turn + 1}; "
                    "add eos_token there in the template, or, if the model stops at the token of the next turn, give "
                    "--reply-end next-turn"
                )
            if turn + 1 < len(messages) and not (plain_end in after and marks[turn + 1]):  # some may be the next turn's
                own = _without_next_turn(copy[: turn + 1], marks[turn], render, control)
                shared = [name for name, _ in takewhile(lambda pair: pair[0] == pair[1], zip(after, own, strict=False))]
                after = shared if shared == own or plain_end in shared else []
            end = after.index(plain_end) if plain_end in after else len(after) - 1
            ends[reply] = tokens[first + end] if after else None
    return ends


def _last_mark(outline: str, marks: Sequence[str]) -> int:
    """Where the last mark of a call is written; its name may be written again with the answer of the tool."""
    return max(outline.index(mark) for mark in marks)


def _without_next_turn(
    messages: Sequence[Message],
    marks: Sequence[str],
    render: Callable[[Sequence[Message]], str],
    control: re.Pattern[str],
) -> list[str]:
    """The control tokens after the calls of the last message; none if the template refuses these messages alone."""
    try:
        outline = render(messages)
    except RecordError:
        return []
    return control.findall(outline, _last_mark(outline, marks)) if all(mark in outline for mark in marks) else []


def _check_all_written(messages: Sequence[Message], marks: Sequence[list[str]], outline: str) -> None:
    """RecordError where the template leaves out a call or a turn, or writes a null content as Python's None."""
    for number, (message, own) in enumerate(zip(messages, marks, strict=True), start=1):
        if any(mark not in outline for mark in own):
            what = "the tool calls" if message.get("tool_calls") else f"the {message['role']} turn"
            raise RecordError(
                f"the chat template does not write {what} of message {number} whole; "
                "use a template that does, or leave tools out of the record"
            )
    _check_no_none(messages, marks, outline)


def call_forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages, and equal ones in the other forms that templates ask for, where they call tools.

    An empty content beside calls is absent, an empty string or null; all arguments are objects, or JSON strings. First
    comes the form of the record; transformers leaves out what is null.
    """
    calling = [message for message in messages if message.get("tool_calls")]
    if not calling:
        yield list(messages)
        return
    is_null = any(message.get("content") is None for message in calling)
    tried = list[Any]()
    for change in (lambda arguments: arguments, _as_object, _as_text):
        calls = [[_with_arguments(call, change) for call in message["tool_calls"]] for message in calling]
        if calls in tried:
            continue
        tried.append(calls)
        for empty in ({}, {"content": ""}, {"content": None}) if is_null else ({"content": ""}, {}, {"content": None}):
            given = iter(calls)
            yield [
                _in_form(message, empty, next(given)) if message.get("tool_calls") else message for message in messages
            ]


def _in_form(message: Message, empty: Message, calls: list[Any]) -> Message:
    rest = {name: value for name, value in message.items() if name != "content"} | {"tool_calls": calls}
    content = message.get("content")
    return rest | ({"content": content} if content else empty)


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    function = call.get("function", call)
    function = function | {"arguments": change(function["arguments"])}
    return call | {"function": function} if "function" in call else function


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    """The object of a JSON string, of which an empty one says that there are none. Other text is returned unchanged."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = parse_json(arguments.strip() or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _check_no_none(messages: Sequence[Message], marks: Sequence[list[str]], outline: str) -> None:
    """RecordError where the template writes a content that is null as Python's None."""
    for turn, message in enumerate(messages):
        if "content" in message and message["content"] is None and marks[turn]:
            start = max((outline.rindex(mark) for own in marks[:turn] for mark in own), default=0)
            if re.search(r"\bNone\b", outline[start : min(outline.index(mark) for mark in marks[turn])]):
                raise RecordError(
                    f'the chat template writes the null content of message {turn + 1} as None; write "content": ""'
                )


def _check_not_quoted(copy: Sequence[Message], outline: str) -> None:
    """RecordError where the template writes arguments that are JSON in a string as a quoted string."""
    replies = [message for message in copy if message["role"] == "assistant"]
    for number, reply in enumerate(replies, start=1):
        for call in reply.get("tool_calls") or []:
            arguments = call.get("function", call)["arguments"]
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in outline:
                raise RecordError(
                    f"the chat template quotes the arguments of reply {number} once more, as they are a string; "
                    'write "arguments" as an object'
                )


def check_calls_stand(calls: Sequence[Any], reply: str, number: int) -> None:
    """RecordError unless the reply's own text has its calls."""
    for call in calls:
        function = call.get("function", call)
        if function["name"] not in reply:
            raise RecordError(
                f"a tool call of reply {number} does not stand before its end token; "
                "begin the template's {% generation %} block where the reply begins"
            )


def _marked(messages: Sequence[Message], *, texts_only: bool = False) -> tuple[list[Message], list[list[str]]]:
    """A copy with a separate mark for each text, and the marks of each message.

    texts_only: arguments that are not text, such as numbers, are left as they are.
    """
    marks: list[list[str]] = [[] for _ in messages]

    def mark(turn: int) -> str:
        marks[turn].append(f"mark{turn}x{len(marks[turn])}x")
        return marks[turn][-1]

    def marked(value: Any, turn: int) -> Any:
        if isinstance(value, dict) and value:
            return {name: marked(inner, turn) for name, inner in value.items()}
        if isinstance(value, list) and value:
            return [marked(inner, turn) for inner in value]
        return value if texts_only and not isinstance(value, str) else mark(turn)

    def call_of(call: Any, turn: int) -> Any:
        function = call.get("function", call)
        given, name = function["arguments"], mark(turn)
        values = given if isinstance(given, dict) else _parsed(given)
        values = {key: marked(value, turn) for key, value in (values or ({} if texts_only else {"x": ""})).items()}
        new = function | {"name": name, "arguments": values if isinstance(given, dict) else json.dumps(values)}
        if isinstance(id := call.get("id"), str):  # Kimi K2 writes the name as a part of the id
            call = call | {"id": id.replace(f"functions.{function['name']}:", f"functions.{name}:")}
        return call | {"function": new} if "function" in call else new

    copy = []
    for turn, message in enumerate(messages):
        changed: Message = {"content": mark(turn)} if (message.get("content") or "").strip() else {}
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [call_of(call, turn) for call in calls]
        copy.append(message | changed)
    return copy, marks


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        parsed = parse_json(arguments)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
