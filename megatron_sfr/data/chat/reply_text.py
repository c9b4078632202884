"""A reply inside rendered text: the parts that have to stand there, reasoning first, and the token that ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sfr.data.chat.tool_calls import Message, check_calls_stand
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import cut

REASONING = ("reasoning_content", "reasoning", "thinking")  # names that transformers hands to templates as one
THINK, END_THINK = "<think>", "</think>"
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
TAIL = 64  # letters at the end of a reply that must stand before its end token, however the template writes the rest


class Unrendered(RecordError):
    """The template does not write a finished reply as inference has it: not whole, or not after its own prompt.

    The message is the reason alone. also: a second remedy, beside a sample for each reply.
    """

    def __init__(self, why: str, also: str = "") -> None:
        super().__init__(why)
        self.also = also


def reasoning_of(message: Message) -> tuple[str, str]:
    """The reasoning that stands beside the content, and the name of its field; two empty strings for none."""
    return next(((str(message[name]), name) for name in REASONING if message.get(name)), ("", ""))


def parts_of(message: Message) -> list[str]:
    """The texts of a reply that its rendering must hold, in order: reasoning and content, without white space around.

    Templates put their own white space around a thought at the start of the content, so it is a separate part.
    """
    content = (message.get("content") or "").strip()
    thought = reasoning_of(message)[0]
    if not thought and content.startswith(THINK) and END_THINK in content:
        thought, _, content = content.removeprefix(THINK).partition(END_THINK)
    return [part for part in (thought.strip(), content.strip()) if part]


def end_of_reply(
    text: str, start: int, message: Message, number: int, control: re.Pattern[str], *, is_last: bool
) -> re.Match[str]:
    """The token that ends a reply without tool calls which starts at text[start].

    It is the first control token after the reply. Inside of a reply that is the last one the template may write
    further control tokens, as gpt-oss does between its channels. Unrendered where the reply is not complete before it.
    """
    end = control.search(text, start)
    if end is None:
        raise RecordError(no_end(number))
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
    check_calls_stand(calls, own, number)


def no_end(number: int) -> str:
    return (
        f"the chat template writes no control token after reply {number}, so the model would never learn to stop; "
        "add eos_token after the reply in the template"
    )


def check_tail(own: str, message: Message, number: int) -> None:
    """RecordError unless the text of a reply has the end of its content: all that `--turns as-rendered` asks for."""
    content, calls = (message.get("content") or "").strip()[-TAIL:], message.get("tool_calls") or []
    if not (content in own if calls else own.rstrip().endswith(content)):
        raise RecordError(
            f"reply {number} does not end before the first control token of its turn; begin the template's "
            "{% generation %} block where the reply begins"
        )
    check_calls_stand(calls, own, number)


def _holds(own: str, parts: Sequence[str], *, ends_on_last: bool = True) -> bool:
    at = 0
    for part in parts:
        found = own.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return not ends_on_last or not parts or own.rstrip().endswith(parts[-1])
