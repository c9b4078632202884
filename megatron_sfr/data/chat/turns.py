"""The turns of one conversation and what its chat template writes for them, rendered and encoded once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_sfr.data.chat.chat_template import ChatTemplate, RenderedTokens
from megatron_sfr.data.chat.rendered_turns import check_system_turn, check_thought_marks, has_tool_turns
from megatron_sfr.data.chat.special_text import TEXT_OPEN
from megatron_sfr.data.chat.tool_calls import Message, ends_of_calls
from megatron_sfr.storage.jsonl import RecordError

Offsets = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation that ends on the reply at turn `last`, as text.

    call_ends: the end tokens of the replies that call tools, by turn; blocks: those that the template marks.
    """

    text: str
    last: int
    call_ends: dict[int, re.Match[str]]
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
            if without == self.prompt(first):
                raise RecordError(
                    "the chat template does not write the record's tools; use a template that does, or leave them out"
                )

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
        """Renders what samples need: one of each trained reply, or one of all. Returns the number of letters.

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
            if len(blocks) != len(replies):
                raise RecordError(
                    f"the chat template marks {len(blocks)} replies with {{% generation %}} where the conversation has "
                    f"{len(replies)}; mark each reply once, or remove the marks"
                )
        else:
            text = self.template.text(messages, self.tools)
        if not has_tool_turns(messages):
            return Rendered(text, last, {}, blocks)
        ends = ends_of_calls(messages, text, lambda turns: self.template.text(turns, self.tools), self.template.control)
        return Rendered(text, last, {replies[reply]: end for reply, end in ends.items()}, blocks)
