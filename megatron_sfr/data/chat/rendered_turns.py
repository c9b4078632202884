"""Turns as the chat template writes them: rendered once, the system turn, parts of a reply, the token that ends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_sfr.data.chat.chat_template import MARK, REASONING, ChatTemplate, RenderedTokens
from megatron_sfr.data.chat.formats import has_tool_turns
from megatron_sfr.data.chat.special_text import TEXT_OPEN, THOUGHT_MARKS
from megatron_sfr.data.chat.tool_calls import Message, check_calls_stand, check_tools_written, ends_of_calls
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import cut, reason

THINK, END_THINK = THOUGHT_MARKS
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
SWITCH = re.compile(r"/(?:no_think|think|system_override)\b")  # SmolLM3 and Nemotron Nano act on these and drop them
USER_TURN = "--persona-as user, which puts it at the start of the first user turn"
TAIL = 64  # characters at the end of a reply that must stand before its end token, however the template writes the rest
Offsets = tuple[int, int]


class Unrendered(RecordError):
    """The template does not write a finished reply as inference has it: not whole, or not after its own prompt.

    The message is the reason alone. also: a second remedy, beside a sample for each reply.
    """

    def __init__(self, why: str, also: str = "") -> None:
        super().__init__(why)
        self.also = also


@dataclass(frozen=True)
class Rendered:
    """A conversation that ends on the reply at turn `last`, as text.

    call_ends: the end tokens of the replies that call tools, by turn, None if unknown; blocks: those that the template
    marks, one for each reply.
    """

    text: str
    last: int
    call_ends: dict[int, re.Match[str] | None]
    blocks: list[Offsets] | None


class Turns:
    """The turns of one conversation and how a template writes them; `trained` are indices of assistant turns."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: list[Any] | None,
        trained: Sequence[int],
        persona: str | None = None,
    ) -> None:
        """RecordError where the template leaves out the system turn or the tools, or a text has a control token."""
        self.template, self.trained, self.persona = template, list(trained), persona
        self.messages: list[Message] = template.prepared(list(messages))
        self.tools: list[Any] | None = template.prepared(tools)
        self.replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self._prompts: dict[int, str] = {}
        self._rendered: dict[int, Rendered] = {}
        self._ids: dict[str, list[int]] = {}
        template.check_texts(self.messages, self.tools)
        first = self.trained[0]
        check_thought_marks(template, [messages[i] for i in self.replies])
        check_system_turn(template, self.messages[:first], self.tools, persona, lambda: self.prompt(first))
        if self.tools:
            first = self.replies[0]
            without = template.text(self.messages[:first], None, prompt=True, like=self.tools)
            check_tools_written(self.tools, self.prompt(first), without)

    def prompt(self, turn: int) -> str:
        """The text that inference has before the reply at this turn."""
        if turn not in self._prompts:
            self._prompts[turn] = self.template.text(self.messages[:turn], self.tools, prompt=True)
        return self._prompts[turn]

    def number(self, turn: int) -> int:
        """Which reply the turn is, from 1."""
        return self.replies.index(turn) + 1

    def rendered(self, last: int) -> Rendered:
        """The conversation that ends on the reply at turn `last`."""
        if last not in self._rendered:
            self._rendered[last] = self._render(last)
        return self._rendered[last]

    def render(self, *, each: bool) -> int:
        """Renders what samples need: one of each trained reply, or one of all. Returns the number of characters.

        What the template refuses is left out here; the sample that asks for it reports the error.
        """
        for last in self.trained if each else self.replies[-1:]:
            with suppress(RecordError):
                self.rendered(last)
        for turn in self.trained:
            with suppress(RecordError):
                self.prompt(turn)
        texts = [*self._prompts.values(), *(rendered.text for rendered in self._rendered.values())]
        return sum(map(len, texts))

    def encode(self) -> None:
        """Encodes what was rendered, for `tokens`."""
        texts = (rendered.text for rendered in self._rendered.values())
        self._ids = {text: self.template.ids(text) for text in texts if TEXT_OPEN not in text}

    def tokens(self, text: str) -> RenderedTokens:
        """A rendered text with its token ids."""
        return RenderedTokens(text, self.template, self._ids.get(text))

    def _render(self, last: int) -> Rendered:
        messages, replies = self.messages[: last + 1], self.replies[: self.number(last)]
        blocks = None
        if self.template.is_marked(self.tools):
            text, blocks = self.template.blocks(messages, self.tools)
            if len(blocks) < len(replies):
                raise RecordError(
                    f"the chat template marks {len(blocks)} replies with {{% generation %}} where the conversation has "
                    f"{len(replies)}; mark each reply once, or remove the marks"
                )
            blocks = blocks if len(blocks) == len(replies) else None  # one for each part, as in some of TRL's
        else:
            text = self.template.text(messages, self.tools)
        if not has_tool_turns(messages):
            return Rendered(text, last, {}, blocks)
        render = partial(self.template.text, tools=self.tools)
        ends = ends_of_calls(messages, text, render, self.template.control, self.template.plain_end())
        return Rendered(text, last, {replies[reply]: end for reply, end in ends.items()}, blocks)


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
    if any(part not in text for part in parts):  # a template that reads a switch alone has no text to write
        return SWITCH.fullmatch(system) is not None and system in template.tokenizer.get_chat_template(tools=tools)
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

    The reply must be complete before the first control token after it, or it is Unrendered. Inside of the last reply
    the template may write further control tokens, as gpt-oss does between its channels.
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
    return template.end_of_turn(text, end)


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


def _holds(own: str, parts: Sequence[str], *, ends_on_last: bool = True) -> bool:
    at = 0
    for part in parts:
        found = own.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return not ends_on_last or not parts or own.rstrip().endswith(parts[-1])
