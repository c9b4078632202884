"""The system turn: how a persona becomes one, and whether the chat template writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_sfr.data.chat.chat_template import ChatTemplate
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import reason

USER_TURN = "--persona-as user, which puts it at the start of the first user turn"


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
    return "the persona, which became the system turn," if is_persona else "the system turn"


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
    if not _writes(template, messages, tools, text):
        raise RecordError(f"the chat template does not write {name}; give {USER_TURN}")


def _writes(template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, text: str) -> bool:
    system = messages[0]["content"].strip()
    if system not in text or not any(system in (message.get("content") or "") for message in messages[1:]):
        return system in text
    mark = "7294816305"  # its text also stands in another turn
    return mark in template.text([messages[0] | {"content": mark}, *messages[1:]], tools, prompt=True)
