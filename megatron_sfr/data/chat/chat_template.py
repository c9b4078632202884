"""A tokenizer's chat template with the options that it is used with: rendered text, its token ids, token positions.

`Conversation`s and prompts are rendered here alone, so training and inference cannot differ.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from itertools import takewhile
from typing import Any

from megatron_sfr.data.chat.special_text import TEXT_OPEN, THOUGHT_MARKS, encode_literally, with_placeholders
from megatron_sfr.data.chat.template_limits import check_output, compiled, render_bounded
from megatron_sfr.data.chat.template_options import TemplateOptions, check_variable
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import reason, strings_of

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION = {"role": "user", "content": "Hi"}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which records have reasoning; a message may have one of them."""
MARK = "7294816305"  # no letters: a template may write them in upper case
SHORT = 200  # characters of a text whose tokens are remembered: the headers of turns


class TemplateRefusal(RecordError):
    """The template raised an error, or was stopped at a limit."""


class ChatTemplate:
    """Renders messages and encodes what was rendered.

    control: finds any special token in text, the longest one first; control_ids: the id of each.
    """

    def __init__(self, tokenizer: Any, options: TemplateOptions) -> None:
        """ValueError for a variable in `template_kwargs` that the template does not read."""
        self.tokenizer, self.options = tokenizer, options
        self.control, self.control_ids = control_tokens(tokenizer)
        self._known = tokenizer.special_tokens_map | options.template_kwargs
        self._day = date.fromisoformat(options.template_date)
        self._next_turns: dict[bool, str] = {}
        for name in options.template_kwargs:
            check_variable(name, tokenizer)

    def prepared(self, value: Any) -> Any:
        """Messages or tools with control tokens in their texts as `special_text` says: refused or set apart."""
        if self.options.special_text == "literal":
            return with_placeholders(value, self.control, self.control_ids)
        return value

    def check_texts(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """RecordError where a text holds a control token."""
        places = [(f"message {number}", message) for number, message in enumerate(messages, start=1)]
        for place, content in [*places, ("the list of tools", tools)]:
            for text in strings_of(content):
                if found := self.control.search(text):
                    raise RecordError(
                        f"{place} has the control token {found[0]!r} in its text; remove it, or give "
                        "--special-text literal, which encodes it as plain text"
                    )

    def is_marked(self, tools: list[Any] | None) -> bool:
        return bool(GENERATION.search(self.tokenizer.get_chat_template(tools=tools)))

    def text(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False, like: Any = None
    ) -> str:
        """The messages as transformers renders them, with the generation prompt if asked for.

        After a last reply comes the token that `reply_end` adds. like: tools that choose the template of a tokenizer
        that has several, if it is not `tools`.
        """
        text, _ = self._render(messages, tools, tools or like, prompt=prompt)
        return text if prompt else text + self._added_end(messages, tools or like)

    def blocks(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) of each {% generation %} block in it."""
        text, blocks = self._render(messages, tools, tools, marked=True)
        return text + self._added_end(messages, tools), blocks

    def next_turn_token(self, reply: Message, like: Any = None) -> str:
        """The control token that begins the turn after a reply: a tool's if the reply calls tools, else the user's.

        An empty string if the template ends the reply itself, or writes no control token there.
        """
        calls = reply.get("tool_calls") or []
        if bool(calls) not in self._next_turns:
            answer = {"role": "assistant", "content": "Hello."} | ({"tool_calls": calls} if calls else {})
            following = {"role": "tool", "content": "Hello."} if calls else _QUESTION
            if calls:
                following |= {"name": calls[0].get("function", calls[0])["name"], "tool_call_id": calls[0].get("id")}
            self._next_turns[bool(calls)] = self._token_between([_QUESTION, answer], following, like)
        return self._next_turns[bool(calls)]

    def end_of_turn(self, text: str, first: re.Match[str]) -> re.Match[str]:
        """The end of a turn, whose first control token after its content is given.

        Command R7B ends a text, then the turn; Kimi K3 closes tags, with their names between control tokens.
        """
        closing = _closing(self.tokenizer, self.options, self.tokenizer.get_chat_template())
        if not closing or not text.startswith(closing, first.start()):
            return first
        *_, last = self.control.finditer(text, first.start(), first.start() + len(closing))
        return last

    def plain_end(self) -> str:
        """The token that ends a reply without tool calls; an empty string if this is not known."""
        closing = _closing(self.tokenizer, self.options, self.tokenizer.get_chat_template())
        return (self.control.findall(closing) or [""])[-1]

    def _token_between(self, finished: list[Message], following: Message, like: Any) -> str:
        try:
            text, _ = self._render(finished, None, like)
            longer, _ = self._render([*finished, following], None, like)
        except TemplateRefusal:
            return ""
        if not longer.startswith(text):  # GLM-5.1 writes thoughts of earlier turns in another way
            text, longer = (written.rpartition(finished[-1]["content"])[2] for written in (text, longer))
        ends = [found.end() for found in self.control.finditer(text)]
        has_own_end = bool(ends) and not text[ends[-1] :].strip()
        token = self.control.match(longer, len(text)) if longer.startswith(text) else None
        return token[0] if token and not has_own_end else ""

    def _added_end(self, messages: Sequence[Message], like: Any) -> str:
        if self.options.reply_end == "template" or messages[-1]["role"] != "assistant":
            return ""
        return self.next_turn_token(messages[-1], like)

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text: the template writes the special tokens itself."""
        if TEXT_OPEN in text:
            return encode_literally(text, self.tokenizer, self.control, self.control_ids)
        return list(_short_ids(self.tokenizer, text)) if len(text) <= SHORT else encode_text(self.tokenizer, text)

    def characters_joined_at(self, text: str, offset: int) -> tuple[str, str]:
        """The characters of one token on both sides of an offset in rendered text; two empty strings for none."""
        if TEXT_OPEN not in text:
            for start, end in self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets:
                if start < offset < end:
                    return text[start:offset], text[offset:end]
        return "", ""

    def _render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        like: Any,
        *,
        prompt: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """What transformers' `render_jinja_template` returns, which would copy all data for each rendering.

        The copy replaces objects other than JSON values, which records do not have.
        """
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        source = self.tokenizer.get_chat_template(tools=like)
        if self.options.persona_as == "user":
            messages = system_in_user_turn(messages)
        # transformers hands no functions over as variables, so the date is set where its templates find their own.
        template = compiled(source)
        shared = template.environment.globals
        known = {"tools": tools, "documents": None, "add_generation_prompt": prompt, **self._known}

        def render() -> tuple[str, list[tuple[int, int]]]:
            clock, shared["strftime_now"] = shared["strftime_now"], self._day.strftime
            try:
                said = [with_all_reasoning_names(message) for message in messages]
                if marked:
                    return _render_with_assistant_indices(template, said, **known)
                return template.render(messages=said, **known), []
            finally:
                shared["strftime_now"] = clock

        try:
            text, blocks = render_bounded(render)
            return check_output(text), blocks
        except (
            Exception
        ) as error:  # a template is a program: it divides by zero, adds None to text, asks for a terabyte
            raise TemplateRefusal(
                f"the chat template refuses the conversation ({reason(error)}); change its turns, or correct the "
                f"template in {self.tokenizer.name_or_path}"
            ) from error


def with_all_reasoning_names(message: Message) -> Message:
    """A message with its reasoning under the names that templates read: reasoning_content, and thinking (gpt-oss).

    transformers adds them from version 5.20. vLLM 0.32 requires an earlier one, with which prompts are to be the same.
    """
    given = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}


class RenderedTokens:
    """Token ids of rendered text, and how many of them stand before a character of it.

    Control tokens cut a text before it is tokenized: the tokens between two of them depend on the text between them
    alone. So a prefix need not be encoded whole, only from its last control token on.
    """

    def __init__(self, text: str, template: ChatTemplate, ids: list[int] | None = None) -> None:
        """ids: of the text, if it has been encoded already."""
        self.text, self.template = text, template
        self.ids = template.ids(text) if ids is None else ids
        controls = list(template.control.finditer(text))
        known = frozenset(template.control_ids.values())
        places = [place for place, id in enumerate(self.ids) if id in known]
        # They differ where the tokenizer writes a special token by itself, such as one for unknown characters.
        alike = [self.ids[place] for place in places] == [template.control_ids[found[0]] for found in controls]
        self._starts = [found.start() for found in controls] if alike else []
        self._places = places if alike else []

    def before(self, character: int) -> int | None:
        """How many tokens the text before a character has; None where they are others than inside the whole text."""
        last = bisect_right(self._starts, character - 1) - 1
        start, first = (self._starts[last], self._places[last]) if last >= 0 else (0, 0)
        piece = self.template.ids(self.text[start:character])
        if not piece or self.ids[first : first + len(piece)] != piece:
            return None
        return first + len(piece)

    def of_control(self, start: int, end: int) -> int | None:
        """The index of the control token that is text[start:end]; None where this is not known."""
        if self._starts:
            return self._places[bisect_right(self._starts, start) - 1]
        count = self.before(end)
        return None if count is None else count - 1


def system_in_user_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system turn's text at the start of the first user turn, and a blank line after it."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return list(messages)
    rest[first] = rest[first] | {"content": f"{system['content'].strip()}\n\n{rest[first]['content']}"}
    return rest


def control_tokens(tokenizer: Any) -> tuple[re.Pattern[str], dict[str, int]]:
    """A pattern that finds any special token in text but THOUGHT_MARKS (the longest one first), and their ids."""
    return _control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, _size: int) -> tuple[re.Pattern[str], dict[str, int]]:
    """Cached by the vocabulary's size too, which changes when tokens are added."""
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for mark in THOUGHT_MARKS:
        special.pop(mark, None)
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), special


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, as `tokenizer(text, add_special_tokens=False)` has them."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without offsets: twice as fast


@lru_cache(maxsize=4096)
def _short_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(encode_text(tokenizer, text))


@lru_cache(maxsize=16)
def _closing(tokenizer: Any, options: TemplateOptions, _source: str) -> str:
    """What the template writes after a reply, with and without a next turn, from the first control token on.

    It ends with eos, else with the last control token that both have. Cached by the template's source too, which may be
    replaced.
    """
    template = ChatTemplate(tokenizer, options)
    finished = [_QUESTION, {"role": "assistant", "content": MARK}]
    try:
        texts = [template.text(messages, None) for messages in (finished, [*finished, _QUESTION])]
    except TemplateRefusal:
        return ""
    after = [text.rpartition(MARK)[2] for text in texts]
    pairs = zip(*(template.control.finditer(text) for text in after), strict=False)
    shared = [token for token, other in takewhile(lambda pair: pair[0][0] == pair[1][0], pairs)]
    if not shared:
        return ""
    last = next((token for token in shared if token[0] == tokenizer.eos_token), shared[-1])
    return after[0][shared[0].start() : last.end()]
