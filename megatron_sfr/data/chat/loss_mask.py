"""The tokens of a conversation and the span of each reply that is trained, its end token included; or an error.

A reply starts where the template's own generation prompt for the turns before it ends, and runs up to and including the
token that ends it: just what the model must write at inference, after just the tokens that it is given there. Only
`as_rendered` takes a reply where the template's {% generation %} blocks have it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sfr.data.chat.chat_template import ChatTemplate, RenderedTokens
from megatron_sfr.data.chat.rendered_turns import (
    EMPTY_THOUGHT,
    END_THINK,
    OPEN_THOUGHT,
    TAIL,
    THINK,
    USER_TURN,
    Offsets,
    Rendered,
    Turns,
    Unrendered,
    check_complete,
    check_system_turn,
    end_of_reply,
    name_of_system_turn,
    no_end,
)
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, TemplateOptions
from megatron_sfr.data.chat.tool_calls import Message, check_calls_stand
from megatron_sfr.data.chat.unrendered_reply import after_prompt, check_open_thought
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.user_files import cut

_QUESTION = [{"role": "user", "content": "Hi"}]
_ANSWER = {"role": "assistant", "content": "Hello."}
EACH = "give --turns each (one sample for each reply, after its own prompt)"


@dataclass(frozen=True)
class Supervised:
    """Token ids of one sample, and [start, end) of each trained reply.

    unlike_last: trained replies without the empty thought that the template writes in the last one.
    unlike_inference: trained replies that are not complete, or follow another context than at inference.
    """

    ids: list[int]
    spans: list[Offsets]
    unlike_last: int = 0
    unlike_inference: int = 0


def together(turns: Turns) -> Supervised:
    """All trained replies in one sample. RecordError where one of them follows another context than at inference."""
    try:
        rendered = turns.rendered(turns.replies[-1])
        tokens = turns.tokens(rendered.text)
        spans, bare, has_empty_thought = [], 0, False
        for turn in turns.trained:
            start, end = _offsets(turns, turn, rendered)
            if (first := tokens.before(start)) is None:
                raise Unrendered(_joined(turns, rendered.text, start, turns.number(turn)))
            spans.append((first, _after(tokens, end, turns.number(turn))))
            has_empty_thought = EMPTY_THOUGHT.match(rendered.text, start) is not None
            bare += not rendered.text[start:].lstrip().startswith((THINK, END_THINK))
        _check_ends(turns, tokens.ids, spans)
    except Unrendered as error:
        for turn in turns.trained:
            each(turns, turn)  # where this fails too, its reason is the true one
        raise RecordError(f"{error}; {EACH}{error.also}") from error
    return Supervised(tokens.ids, spans, unlike_last=bare if has_empty_thought else 0)


def each(turns: Turns, turn: int) -> Supervised:
    """The reply at one turn after its own prompt, as inference shows it.

    Where the template does not write a finished reply as the model does, its content follows the prompt as it is.
    """
    start, number = len(turns.prompt(turn)), turns.number(turn)
    try:
        rendered = turns.rendered(turn)
        text, (_, end) = rendered.text, _offsets(turns, turn, rendered)
    except Unrendered as error:
        text, end = after_prompt(
            turns.template, turns.messages[:turn], turns.messages[turn], turns.tools, number, str(error)
        )
    tokens = turns.tokens(text)
    first = tokens.before(start)
    if first is None:
        return _apart(turns, text, start, end, number)
    return Supervised(tokens.ids, [(first, _after(tokens, end, number))])


def as_rendered(turns: Turns) -> Supervised:
    """All trained replies in one sample, as far as the template writes them, in whatever context it has there."""
    rendered = turns.rendered(turns.replies[-1])
    tokens = turns.tokens(rendered.text)
    spans, unlike = [], 0
    for turn in turns.trained:
        number, prompt = turns.number(turn), turns.prompt(turn)
        is_exact = rendered.text.startswith(prompt)
        if rendered.blocks is None and not is_exact:
            raise RecordError(f"{_not_a_prefix(number)}; {EACH}")
        start = len(prompt) if rendered.blocks is None else rendered.blocks[number - 1][0]
        try:
            end = _end_of_calls(rendered, turn, number) or turns.template.control.search(rendered.text, start)
        except Unrendered as error:
            raise RecordError(f"{error}; {EACH}") from error
        if end is None:
            raise RecordError(no_end(turns.template, turns.messages[turn], number))
        own = rendered.text[start : end.start()]
        _check_tail(own, turns.messages[turn], number)
        try:
            check_complete(own, turns.messages[turn], number)
        except Unrendered:
            is_exact = False
        unlike += not (is_exact and start == len(prompt))
        if (first := tokens.before(start)) is None:
            raise RecordError(f"{_joined(turns, rendered.text, start, number)}; {EACH}")
        spans.append((first, _after(tokens, turns.template.end_of_turn(rendered.text, end).span(), number)))
    try:
        _check_ends(turns, tokens.ids, spans)
    except Unrendered as error:
        raise RecordError(f"{error}; {EACH}") from error
    return Supervised(tokens.ids, spans, unlike_inference=unlike)


def prompt_ids(messages: Sequence[Message], tokenizer: Any, options: TemplateOptions = AS_AT_INFERENCE) -> list[int]:
    """Token ids of the messages with the generation prompt. RecordError where the template fails."""
    template = ChatTemplate(tokenizer, options)
    messages = template.prepared(list(messages))
    template.check_texts(messages, None)
    check_system_turn(template, messages, None, None, lambda: template.text(messages, None, prompt=True))
    return template.ids(template.text(messages, None, prompt=True))


def reply_end_token(tokenizer: Any, options: TemplateOptions = AS_AT_INFERENCE) -> int | None:
    """The id on which a reply ends; None if the chat template writes no control token there."""
    try:
        template = ChatTemplate(tokenizer, options)
        text, (start, end) = after_prompt(template, _QUESTION, _ANSWER, None, 1, "the example")
    except RecordError:
        return None
    return template.control_ids[text[start:end]]


def _offsets(turns: Turns, turn: int, rendered: Rendered) -> tuple[int, Offsets]:
    """Where in the text the reply at a turn starts, and its end token. Unrendered where inference shows another text.

    RecordError where no such place exists.
    """
    prompt, number, text = turns.prompt(turn), turns.number(turn), rendered.text
    start, message = len(prompt), turns.messages[turn]
    if not text.startswith(prompt):
        first = turns.messages[0]
        if first["role"] == "system" and first["content"].strip() not in text:
            name = name_of_system_turn(turns.messages, turns.persona)
            raise Unrendered(
                f"the chat template does not write {name} in a finished conversation", also=f", or {USER_TURN}"
            )
        raise Unrendered(_not_a_prefix(number))
    if rendered.blocks is not None and (block := rendered.blocks[number - 1][0]) > start:
        raise RecordError(
            f"the {{% generation %}} block of reply {number} begins after {cut(text[start:block], 40)!r}, which the "
            "model has to write too; begin the block where the generation prompt ends, or give --turns as-rendered"
        )
    end = _end_of_calls(rendered, turn, number)
    if end is None:
        end = end_of_reply(text, start, message, number, turns.template, is_last=turn == rendered.last)
    else:
        check_complete(text[start : end.start()], message, number)
    own = text[start : end.start()]
    if (ending := turns.template.plain_end()) and ending in own:
        raise Unrendered(f"the chat template writes {ending}, which ends replies, inside of reply {number}")
    if (empty := EMPTY_THOUGHT.match(own)) and own.startswith(THINK, empty.end()):
        raise Unrendered(f"the chat template writes an empty thought before that of reply {number}")
    if OPEN_THOUGHT.search(prompt):
        check_open_thought(turns.template, own, message, number)
        if own.lstrip().startswith(THINK):
            raise Unrendered(f"the chat template opens the thought of reply {number} twice")
    return start, end.span()


def _end_of_calls(rendered: Rendered, turn: int, number: int) -> re.Match[str] | None:
    """The end token of the reply at a turn if it calls tools, else None. Unrendered if its end is not known."""
    end = rendered.call_ends.get(turn)
    if end is None and turn in rendered.call_ends:
        raise Unrendered(f"where the tool calls of reply {number} end cannot be told from the turn that follows")
    return end


def _check_tail(own: str, message: Message, number: int) -> None:
    """RecordError unless the text of a reply has the end of its content: all that `--turns as-rendered` asks for."""
    content, calls = (message.get("content") or "").strip()[-TAIL:], message.get("tool_calls") or []
    if not (content in own if calls else own.rstrip().endswith(content)):
        raise RecordError(
            f"reply {number} does not end before the first control token of its turn; begin the template's "
            "{% generation %} block where the reply begins"
        )
    if calls:
        check_calls_stand(calls, own, number)


def _after(tokens: RenderedTokens, end: Offsets, number: int) -> int:
    """How many tokens there are up to and including an end token."""
    place = tokens.of_control(*end)
    if place is None:
        raise RecordError(
            f"the tokenizer joins the end of reply {number} to what follows; use one whose control tokens cut the text"
        )
    return place + 1


def _apart(turns: Turns, text: str, start: int, end: Offsets, number: int) -> Supervised:
    """The sample of a reply whose first characters the tokenizer would join to the prompt: the two are encoded apart.

    So the model is given the prompt's own tokens at inference. The reply is encoded behind its end token, since
    tokenizers may write a blank before the first character of a text.
    """
    template, token = turns.template, text[end[0] : end[1]]
    context = template.ids(text[:start])
    reply = RenderedTokens(token + text[start:], template)
    ids = context + reply.ids[1:]
    if reply.ids[0] != template.control_ids[token] or _decoded(ids, template) != _decoded(template.ids(text), template):
        raise RecordError(f"{_joined(turns, text, start, number)}; begin the reply with another character")
    shift = len(token) - start
    return Supervised(ids, [(len(context), len(context) - 1 + _after(reply, (end[0] + shift, end[1] + shift), number))])


def _decoded(ids: Sequence[int], template: ChatTemplate) -> str:
    return template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check_ends(turns: Turns, ids: Sequence[int], spans: Sequence[Offsets]) -> None:
    """Unrendered if replies end on different tokens, other than the headers that `reply_end` next-turn expects."""
    template, headers = turns.template, list[int | None]()
    for turn in turns.trained:
        token = template.next_turn_token(turns.messages[turn]) if template.options.reply_end == "next-turn" else ""
        headers.append(template.control_ids.get(token))
    others = {ids[end - 1] for (_, end), header in zip(spans, headers, strict=True) if ids[end - 1] != header}
    if len(others) > (1 if set(headers) == {None} else 0):
        names = template.tokenizer.convert_ids_to_tokens(sorted({ids[end - 1] for _, end in spans}))
        raise Unrendered(f"the replies end on different control tokens, {names}")


def _not_a_prefix(number: int) -> str:
    return (
        f"the prompt of reply {number} at inference is not a prefix of the conversation as the chat template writes it"
    )


def _joined(turns: Turns, text: str, start: int, number: int) -> str:
    before, after = turns.template.characters_joined_at(text, start)
    if not after:
        return f"the tokenizer joins the start of reply {number} to the text before it"
    return f"the tokenizer joins {before!r} before reply {number} with {after!r} at its start in one token"
