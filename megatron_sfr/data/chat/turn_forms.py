"""Turns as datasets, trainers and APIs write them, as turns of role, content and tool_calls.

- ShareGPT   {"from": "human", "value": ...}; also pairs, {"human": ..., "assistant": ...}, and LIMA's plain texts
- ms-swift   the roles tool_call, whose content is a call as JSON, and tool_response
- Anthropic  content in blocks: thinking, text, tool_use and tool_result
- OpenAI     content in parts; the older function_call and role function
- Gemini     contents of roles user and model, in parts

KNOWN names the forms of records that are not read, because they leave a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_sfr.data.chat.chat_template import REASONING
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import parse_json, shown

TRAINED = ("train", "loss", "weight")
"""Fields of a turn that say whether it is trained; `loss` is ms-swift's name of `train`."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that equal an absent one."""
TEXT_PARTS = ("text", "input_text", "output_text")
PART_HINTS = {
    "thinking": "give it as reasoning_content",
    "reasoning": "give it as reasoning_content",
    "tool_use": "give it in a turn of the assistant",
    "tool_result": "give it in a turn of the user, or as a turn of the role tool",
}
REPLY_PARTS = ("thinking", "text", "tool_use")
CALL = "tool_call"  # a role until its turns are joined with the reply that they belong to
SHAREGPT_ROLES = (
    {"system": "system", "human": "user", "user": "user"}
    | dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant")
    | dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool")
    | dict.fromkeys(("function_call", CALL), CALL)
)
PAIRS = (("human", "assistant"), ("input", "output"))
"""Names of a question and its answer in one object: of ms-swift; of Capybara and XTuner."""

KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("chosen",), "the record is a preference pair"),
    (
        ("preferred_output",),
        "the record is a preference pair of OpenAI's: take the messages of input and preferred_output",
    ),
    (
        ("question", "thinking_trajectories"),
        "the record is s1K's: choose a thought (reasoning_content) and an attempt (content) for the reply",
    ),
    (
        ("question", "deepseek_thinking_trajectory"),
        "the record is s1K's: choose a thought (reasoning_content) and an attempt (content) for the reply",
    ),
    (("system", "chat"), "the record is Glaive's, all turns in one text: take them apart, calls as tool_calls"),
    (("prompt", "message_tree_id"), "the record is a tree of messages (OASST): write one for each path to a reply"),
    (("input_ids",), "the record holds tokens of another tokenizer or template: give the text"),
)
"""Columns by which a form is known, and what it is."""
TOOLS = ("tools", "functions")


def known_form(fields: dict[str, Any], key: str, is_chat: Callable[[dict[str, Any]], bool]) -> str:
    """What a record that has no known format is, as part of a sentence; empty if that is not known either.

    key: the column of its turns; is_chat: whether an object has the format of a chat.
    """
    given = {name for name, value in fields.items() if value is not None}
    if not isinstance(fields.get("chat"), str):  # Glaive's is a text
        given -= {"chat"}
    known = [what for columns, what in KNOWN if given.issuperset(columns)]
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and name not in TOOLS}
    objects = {name: [part for part in value if isinstance(part, dict)] for name, value in lists.items()}
    turns = [name for name, parts in objects.items() if any("role" in part or "from" in part for part in parts)]
    records = [name for name, parts in objects.items() if any(map(is_chat, parts[:1]))]
    known += [f"its column {name} holds the turns: rename it to {key}" for name in turns]
    known += [f"its column {name} holds records: write each on a separate line" for name in records]
    return "".join(f"; {what}" for what in known[:1])


def excludes(value: Any) -> bool:
    """Whether a field such as `train` or `loss` says that a record, or a part of it, is not trained.

    A list has a value for each part, and 1 stands for a part that is trained.
    """
    if value in EMPTY:
        return False
    if isinstance(value, str):
        return value.strip().lower() in ("0", "false", "no")
    if isinstance(value, list):
        return any(part != 1 for part in value)
    return isinstance(value, dict) or value == 0


def unnamed_turns(fields: dict[str, Any]) -> dict[str, list[Any]]:
    """Gemini's `contents` as messages and UltraChat's `data` as conversations; empty for other records.

    Columns with these names hold other things too, so what is in them decides.
    """
    contents, texts = fields.get("contents"), fields.get("data")
    if isinstance(contents, list) and any(isinstance(content, dict) and "parts" in content for content in contents):
        return {"messages": _gemini_turns(fields)}
    if "id" in fields and isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return {"conversations": texts}
    return {}


def _gemini_turns(fields: dict[str, Any]) -> list[Message]:
    """The turns of Gemini's `contents`, as in Vertex AI's files, after its `systemInstruction`."""
    if fields.get("tools"):
        raise RecordError("the record has tools in Gemini's form, which is not read; write messages as OpenAI's")
    given = [fields[name] for name in ("systemInstruction", "system_instruction") if fields.get(name)]
    turns = [_of_gemini(content, number) for number, content in enumerate(fields["contents"], start=1)]
    return [_of_gemini(system, 0) | {"role": "system"} for system in given] + turns


def _of_gemini(content: Any, number: int) -> Message:
    parts = content.get("parts") if isinstance(content, dict) else None
    what = f"content {number}" if number else "systemInstruction"
    if not isinstance(parts, list) or not parts:
        raise RecordError(f'{what} has no parts; write {{"role": ..., "parts": [{{"text": ...}}]}}')
    for part in parts:
        if not isinstance(part, dict) or {name for name, value in part.items() if value not in EMPTY} - {"text"}:
            raise RecordError(f"{what} has the part {shown(part)}, and only text is read; write messages as OpenAI's")
    kept = {name: content[name] for name in TRAINED if content.get(name) is not None}
    _check_fields(content, ("role", "parts", *kept), what)
    role = content.get("role")
    return {"role": "assistant" if role == "model" else role, "content": text_of(parts, number), **kept}


def named_turns(turns: Sequence[Any], form: str) -> list[Any]:
    """Turns with role and content, whatever the list of turns is called. form: messages or sharegpt."""
    if form == "sharegpt" and all(isinstance(turn, str) for turn in turns):  # LIMA
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [named for number, turn in enumerate(turns, start=1) for named in _named(turn, number, form)]


def _named(turn: Any, number: int, form: str) -> list[Any]:
    if isinstance(turn, dict) and "from" in turn:
        return [_sharegpt_turn(turn, number)]
    if form == "sharegpt" and not (isinstance(turn, dict) and "role" in turn):
        pair = next((pair for pair in PAIRS if isinstance(turn, dict) and all(name in turn for name in pair)), None)
        if pair is None:
            raise RecordError(
                f'turn {number} is not {{"from": ..., "value": ...}}; write it so, or with role and content'
            )
        names = {"system": "system", pair[0]: "user", pair[1]: "assistant"}
        _check_fields(turn, names, f"turn {number}")
        given = [name for name in names if name != "system" or turn.get(name) not in EMPTY]
        return [{"role": names[name], "content": turn[name]} for name in given]
    return [turn]


def _check_fields(turn: Message, known: Sequence[str] | dict[str, str], what: str) -> None:
    """RecordError for a field that is neither known nor empty. what: the turn, for the error."""
    if extra := sorted(name for name, value in turn.items() if name not in known and value not in EMPTY):
        raise RecordError(f"{what} has the field {shown(extra[0])}, which is not supported; remove it")


def _sharegpt_turn(turn: Message, number: int) -> Message:
    kept = {name: turn[name] for name in (*TRAINED, *REASONING) if turn.get(name) is not None}
    _check_fields(turn, ("from", "value", *kept), f"turn {number}")
    who = turn["from"]
    role = SHAREGPT_ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise RecordError(f"turn {number} is from the unknown {shown(who)}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": turn.get("value"), **kept}


def plain_turns(turns: list[Any]) -> list[Any]:
    """Turns with the content as one text, calls as tool_calls, and of the roles system, user, assistant and tool.

    A call in a separate turn is part of the reply before it, so calls that follow each other are parallel.
    """
    plain = list[Any]()
    for number, turn in enumerate(turns, start=1):
        for new in _plain(turn, number) if isinstance(turn, dict) else [turn]:
            if isinstance(new, dict) and new.get("role") == CALL:
                has_reply = plain and isinstance(plain[-1], dict) and plain[-1].get("role") == "assistant"
                new = _joined(plain.pop() if has_reply else {}, new, number)
            plain.append(new)
    return plain


def _plain(turn: Message, number: int) -> list[Message]:
    """A turn as one, or as several: results of tools are separate turns."""
    role, content = turn.get("role"), turn.get("content")
    if isinstance(role, str):
        turn = turn | {"role": {"developer": "system", "function": "tool", "tool_response": "tool"}.get(role, role)}
    if role == CALL:
        return [turn | {"content": "", "tool_calls": calls_of(content, f"the call of turn {number}")}]
    if turn.get("function_call") and not turn.get("tool_calls"):
        calls = [{"type": "function", "function": turn["function_call"]}]
        turn = turn | {"function_call": None, "tool_calls": calls}
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if role == "user" and "tool_result" in kinds:
            return _results(turn, content, kinds.count("tool_result"), number)
        if role == "assistant" and ("tool_use" in kinds or "thinking" in kinds):
            return [_reply(turn, content, kinds, number)]
        return [turn | {"content": text_of(content, number)}]
    return [turn | {"content": ""} if content is None and turn.get("role") == "system" else turn]


def calls_of(value: Any, what: str) -> list[dict[str, Any]]:
    """The tool_calls of a call or a list of calls, each with name and arguments, also as JSON in a string."""
    try:
        calls = value if isinstance(value, dict | list) else parse_json(value if isinstance(value, str) else "")
    except ValueError as error:
        raise RecordError(f'{what} is not JSON; write "{{\\"name\\": ..., \\"arguments\\": {{...}}}}"') from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _joined(reply: Message, call: Message, number: int) -> Message:
    """A reply with the calls of a turn after it. reply: empty if there is none."""
    kept = {name: value for name, value in call.items() if value is not None and name not in ("role", "content")}
    if reply and is_trained(reply) != is_trained(call):
        raise RecordError(f"turn {number} is part of the reply before it, and one of them is not trained; mark both")
    if twice := [name for name in REASONING if kept.get(name) and reply.get(name)]:
        raise RecordError(f"turn {number} is part of the reply before it, which has {twice[0]} too; write it once")
    calls = [*(reply.get("tool_calls") or []), *call["tool_calls"]]
    return {"role": "assistant", "content": ""} | kept | reply | {"tool_calls": calls}


def is_trained(turn: Message) -> bool:
    """Whether no field of a turn makes it context."""
    return all(turn.get(name) in (None, 1) for name in TRAINED)


def _results(turn: Message, parts: Sequence[Any], results: int, number: int) -> list[Message]:
    """The results of tools as tool turns, and the rest of the user's turn after them, if there is any."""
    turns = list[Message]()
    for part in parts[:results]:
        if not isinstance(part, dict) or part.get("type") != "tool_result":
            raise RecordError(f"message {number} has a tool_result after other content; put the results first")
        if part.get("is_error"):
            raise RecordError(
                f"message {number} has a tool_result with is_error, which templates cannot write; "
                "say it in its content and leave the field out"
            )
        content = part.get("content")
        text = "" if content is None else text_of(content, number) if isinstance(content, list) else content
        turns.append({"role": "tool", "content": text, "tool_call_id": part.get("tool_use_id")})
    text = text_of(parts[results:], number)
    return [*turns, turn | {"content": text}] if text.strip() else turns


def _reply(turn: Message, parts: Sequence[Any], kinds: Sequence[Any], number: int) -> Message:
    """A reply whose parts are a thought, its text and its calls, in this order."""
    ranks = [REPLY_PARTS.index(kind) if kind in REPLY_PARTS else 1 for kind in kinds]
    if ranks != sorted(ranks) or ranks.count(0) > 1:
        raise RecordError(
            f"message {number} has its parts in another order than one thought, text, calls; write a message for each"
        )
    thought, texts, calls = ([part for part, at in zip(parts, ranks, strict=True) if at == rank] for rank in range(3))
    new: Message = {"content": text_of(texts, number)}
    if calls:
        given = [
            {"id": call.get("id"), "type": "function"}
            | {"function": {"name": call.get("name"), "arguments": call.get("input")}}
            for call in calls
        ]
        new["tool_calls"] = [{name: value for name, value in call.items() if value is not None} for call in given]
    for part in thought:
        text = part.get("thinking")
        new["reasoning_content"] = text_of(text, number) if isinstance(text, list) else text
    named = [name for name, parts in (("tool_calls", calls), *((name, thought) for name in REASONING)) if parts]
    if twice := [name for name in named if turn.get(name)]:
        raise RecordError(f"message {number} has {twice[0]} beside its content that holds such parts; keep one of them")
    return turn | new


def text_of(parts: Sequence[Any], number: int) -> str:
    """The text of content parts, each as {"type": "text", "text": ...} or as a string."""
    return "".join(_part(part, number) for part in parts)


def _part(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        hint = PART_HINTS.get(kind, "remove it") if isinstance(kind, str) else "remove it"
        raise RecordError(f"message {number} has content of type {shown(kind)}; only text can be trained on: {hint}")
    if isinstance(part, dict) and any(part.get(name) not in (None, 1) for name in TRAINED):
        raise RecordError(f"message {number} has a part that is not trained; a reply is trained or not: mark the turn")
    return text
