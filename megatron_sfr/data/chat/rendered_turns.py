"""Turns in the text that a chat template writes: the system turn, the parts of a reply, and the token that ends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sfr.data.chat.chat_template import REASONING, ChatTemplate
from megatron_sfr.data.chat.tool_calls import Message, check_calls_stand
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import cut, reason

THINK, END_THINK = "<think>", "</think>"
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
SWITCH = re.compile(r"/(?:no_think|think|system_override)\b")  # SmolLM3 acts on these in a system turn and drops them
MARK = "7294816305"  # no letters: a template may write them in upper case
USER_TURN = "--persona-as user, which puts it at the start of the first user turn"
TAIL = 64  # letters at the end of a reply that must stand before its end token, however the template writes the rest


class Unrendered(RecordError):
    """The template does not write a finished reply as inference has it: not whole, or not after its own prompt.

    The message is the reason alone. also: a second remedy, beside a sample for each reply.
    """

    def __init__(self, why: str, also: str = "") -> None:
        super().__init__(why)
        self.also = also


def persona_turn(persona: str) -> Message:
    """The system turn of a persona: whole sentences are used as they stand, a name or a phrase is put into one."""
    text = persona.strip()
    is_prose = "\n" in text or text.endswith((".", "!", "?", "。", "！", "？", "…"))
    return {"role": "system", "content": text if is_prose else f"Answer in this persona: {text}."}


def with_persona(messages: Sequence[Message], persona: str | None, persona_as: str) -> list[Message]:
    """The messages, with the persona as their system turn where they have none. A blank system turn counts as none."""
    if messages[0]["role"] == "system" and not (messages[0].get("content") or "").strip():
        messages = messages[1:]
    if persona is None or persona_as == "field" or messages[0]["role"] == "system":
        return list(messages)
    return [persona_turn(persona), *messages]


def name_of_system_turn(messages: Sequence[Message], persona: str | None) -> str:
    """The system turn in a message to the user, who may not know that a persona becomes one."""
    is_persona = persona is not None and messages[0] == persona_turn(persona)
    return "the persona (it became the system turn)" if is_persona else "the system turn"


def check_system_turn(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[Any] | None,
    persona: str | None,
    prompt: Callable[[], str],
) -> None:
    """RecordError where the template refuses or leaves out the system turn of the messages of `prompt()`."""
    if messages[0]["role"] != "system" or template.options.persona_as == "user":
        return
    name = name_of_system_turn(messages, persona)
    try:
        text = prompt()
    except RecordError as error:
        try:
            template.text(messages[1:], tools, prompt=True)
        except RecordError:
            raise error from None  # it is not about the system turn
        cause = reason(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)
        raise RecordError(f"the chat template refuses {name} ({cause}); give {USER_TURN}") from error
    if not _writes_system(template, messages, tools, text):
        raise RecordError(f"the chat template does not write {name}; give {USER_TURN}")


def _writes_system(template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, text: str) -> bool:
    system = messages[0]["content"].strip()
    parts = [part.strip() for part in SWITCH.split(system) if part.strip()] or [system]
    others = [message.get("content") or "" for message in messages[1:]]
    if any(part not in text for part in parts):
        return False
    if not any(part in content for part in parts for content in others):
        return True
    return MARK in template.text([messages[0] | {"content": MARK}, *messages[1:]], tools, prompt=True)


def check_thought_marks(template: ChatTemplate, replies: Sequence[Message]) -> None:
    """RecordError if a reply opens with <think>, which the template, with other marks, writes as plain text."""
    opening = [number for number, reply in enumerate(replies, 1) if len(parts_of(reply)) > 1 and _has_thought(reply)]
    if not opening:
        return
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    try:
        text = template.text([question, answer | {"reasoning_content": MARK}], None)
        before, found, _ = text.rpartition(MARK)
        mark = before[len(template.text([question], None, prompt=True)) :].strip()
        as_text = template.text([question, answer | {"content": f"{THINK}\n{MARK}\n{END_THINK}\n\nHello."}], None)
    except RecordError:
        return  # the record's own rendering says why
    if found and mark and THINK not in before and THINK in as_text:
        raise RecordError(
            f"reply {opening[0]} has a thought in {THINK}...{END_THINK}, which the chat template marks with {mark!r}; "
            "give the thought as reasoning_content"
        )


def _has_thought(reply: Message) -> bool:
    return (reply.get("content") or "").lstrip().startswith(THINK)


def has_tool_turns(messages: Sequence[Message]) -> bool:
    """Whether a turn calls tools or holds the answer of one."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def reasoning_of(message: Message) -> tuple[str, str]:
    """The reasoning that stands beside the content, and the name of its field; two empty strings for none."""
    return next(((str(message[name]), name) for name in REASONING if message.get(name)), ("", ""))


def parts_of(message: Message) -> list[str]:
    """The texts of a reply that its rendering must hold, in order: reasoning and content, without white space around.

    Templates put their own white space around a thought at the start of the content, so it is a separate part. A reply
    that is a thought alone ends on its closing tag.
    """
    content = (message.get("content") or "").strip()
    thought = reasoning_of(message)[0]
    if not thought and content.startswith(THINK) and END_THINK in content:
        thought, _, content = content.removeprefix(THINK).partition(END_THINK)
        content = content.strip() or END_THINK
    return [part for part in (thought.strip(), content.strip()) if part]


def end_of_reply(
    text: str, start: int, message: Message, number: int, template: ChatTemplate, *, is_last: bool
) -> re.Match[str]:
    """The token that ends a reply without tool calls which starts at text[start].

    It is the first control token after the reply. Inside of a reply that is the last one the template may write
    further control tokens, as gpt-oss does between its channels. Unrendered where the reply is not complete before it.
    """
    control = template.control
    end = control.search(text, start)
    if end is None:
        raise RecordError(no_end(template, message, number))
    parts = parts_of(message)
    if is_last and not _holds(text[start : end.start()], parts):
        after = text.rfind(parts[-1], start)
        later = control.search(text, after + len(parts[-1])) if after >= 0 else None
        end = later or end
    check_complete(text[start : end.start()], message, number)
    return end


def check_complete(own: str, message: Message, number: int) -> None:
    """Unrendered unless the text of a reply holds all of its parts and, without tool calls, ends on the last one."""
    parts, calls = parts_of(message), message.get("tool_calls") or []
    if not _holds(own, parts, ends_on_last=not calls):
        thought, name = reasoning_of(message)
        if thought and thought.strip() not in own:
            what = f"leaves out the {name} of reply {number}"
        elif not own.strip():
            what = f"writes a control token at the start of reply {number}"
        elif parts[-1].endswith(own.strip()) or own.rstrip().endswith(parts[-1][-TAIL:]):
            what = f"leaves out the beginning of reply {number} ({cut(parts[0], 40)!r})"
        elif parts[-1][:TAIL] in own:
            what = f"leaves out the end of reply {number}"
        else:
            what = f"rewrites reply {number}"
        raise Unrendered(f"the chat template {what}")
    if calls:
        check_calls_stand(calls, own, number)


def no_end(template: ChatTemplate, reply: Message, number: int) -> str:
    token = template.next_turn_token(reply)
    stops = f", or, if the model stops at {token} of the next turn, give --reply-end next-turn" if token else ""
    return (
        f"the chat template writes no control token after reply {number}, so the model would never learn to stop; "
        f"add eos_token after the reply in the template{stops}"
    )


def check_tail(own: str, message: Message, number: int) -> None:
    """RecordError unless the text of a reply has the end of its content: all that `--turns as-rendered` asks for."""
    content, calls = (message.get("content") or "").strip()[-TAIL:], message.get("tool_calls") or []
    if not (content in own if calls else own.rstrip().endswith(content)):
        raise RecordError(
            f"reply {number} does not end before the first control token of its turn; begin the template's "
            "{% generation %} block where the reply begins"
        )
    if calls:
        check_calls_stand(calls, own, number)


def _holds(own: str, parts: Sequence[str], *, ends_on_last: bool = True) -> bool:
    at = 0
    for part in parts:
        found = own.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return not ends_on_last or not parts or own.rstrip().endswith(parts[-1])
