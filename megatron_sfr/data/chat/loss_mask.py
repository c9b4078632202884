"""Where the replies are in a rendered chat template: the token span that the assistant itself writes, or an error.

A reply starts where the generation prompt ends and runs up to and including the first control token: just what the
model must write at inference, so that it is conditioned on the same tokens as there. Its start is told by the
template's own `{% generation %}` blocks, else by rendering the turns before it with a generation prompt. Both ways
are checked against the whole rendering, in text and in tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_sfr.data.chat.template_limits import check_output, render_bounded
from megatron_sfr.data.chat.tool_calls import Message, check_calls_stand, ends_of_calls, has_tool_turns, strings_of
from megatron_sfr.storage.jsonl import RowError
from megatron_sfr.storage.user_files import reason

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXAMPLE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
_HINT = (
    "give a folder with tokenizer.json; it, tokenizer_config.json or config.json may be damaged, or written by another "
    "version of tokenizers"
)
TAIL = 64  # letters at the end of a reply that must stand before its end token


def reply_spans(
    messages: Sequence[Message], tokenizer: Any, tools: list[Any] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of the whole conversation, and [start, end) of each assistant turn, its end token included.

    RowError where no exact mask exists, or the template leaves out what the row says.
    """
    control, control_ids = control_tokens(tokenizer)
    _check_texts(messages, tools, control)
    text, starts = _render(messages, tokenizer, tools)
    ends = _check_written(messages, tokenizer, tools, text, control)
    ids = _tokenize(text, tokenizer)
    spans = []
    replies = [message for message in messages if message["role"] == "assistant"]
    for number, (start, reply) in enumerate(zip(starts, replies, strict=True), start=1):
        calls = reply.get("tool_calls")
        end = ends[number - 1] if calls else control.search(text, start)
        if end is None:
            raise RowError(
                f"the chat template writes no control token after reply {number}, so the model would never learn "
                "to stop; add eos_token after the reply in the template"
            )
        own, tail = text[start : end.start()].rstrip(), (reply.get("content") or "").strip()[-TAIL:]
        if not (tail in own if calls else own.endswith(tail)):
            raise RowError(
                f"reply {number} does not stand whole before the first control token of its turn; "
                "begin the template's {% generation %} block where the reply begins"
            )
        check_calls_stand(calls or [], own, number)
        head = _tokenize(text[:start], tokenizer)
        if not head or ids[: len(head)] != head:
            raise RowError(
                f"the tokenizer joins the start of reply {number} to the text before it, so no mask is exact; "
                "remove white space at the start of the reply, or change the template's text there"
            )
        # Control tokens cut the text before it is tokenized: what stands before one has the same tokens by itself.
        before = _tokenize(text[: end.start()], tokenizer) if calls else head
        if ids[: len(before)] != before:
            raise RowError(f"the tokenizer joins the end of reply {number} to what follows; leave tools out of the row")
        last = next(i for i in range(len(before), len(ids)) if ids[i] in control_ids)
        spans.append((len(head), last + 1))
    if len(ends_on := {ids[end - 1] for _, end in spans}) > 1:  # one of them is the header of the turn that follows
        raise RowError(
            f"the replies end on different control tokens, {tokenizer.convert_ids_to_tokens(sorted(ends_on))}; "
            "let the template write eos_token after each reply"
        )
    return ids, spans


def reply_end_token(tokenizer: Any) -> int | None:
    """The id on which the chat template ends a reply; None where it writes no control token there."""
    try:
        ids, spans = reply_spans(_EXAMPLE, tokenizer)
    except RowError:
        return None
    return ids[spans[-1][1] - 1]


def control_tokens(tokenizer: Any) -> tuple[re.Pattern[str], frozenset[int]]:
    """A pattern that finds any special token in text (the longest one first), and the ids of these tokens."""
    return _control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, _size: int) -> tuple[re.Pattern[str], frozenset[int]]:
    """Cached by the vocabulary's size too, which changes when tokens are added."""
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), frozenset(special.values())


def _check_texts(messages: Sequence[Message], tools: list[Any] | None, control: re.Pattern[str]) -> None:
    places = [(f"message {number}", message) for number, message in enumerate(messages, start=1)]
    for place, content in [*places, ("the list of tools", tools)]:
        for text in strings_of(content):
            if found := control.search(text):
                raise RowError(f"{place} has the control token {found[0]!r} in its text; remove it")


def _check_written(
    messages: Sequence[Message], tokenizer: Any, tools: list[Any] | None, text: str, control: re.Pattern[str]
) -> dict[int, re.Match[str]]:
    """That the template wrote system turns and tools; the ends of the replies that call tools."""
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise RowError(
            "the chat template does not write the system turn; use a template that does, or put it first "
            "into the user turn"
        )
    if tools and text == _render_text(messages, tokenizer, None):
        raise RowError("the chat template does not write the row's tools; use a template that does, or leave them out")
    if not has_tool_turns(messages):
        return {}
    return ends_of_calls(messages, text, lambda turns: _render_text(turns, tokenizer, tools), control)


def _render(messages: Sequence[Message], tokenizer: Any, tools: list[Any] | None) -> tuple[str, list[int]]:
    """The rendered conversation and the index of the first letter of each reply."""
    marked = bool(GENERATION.search(tokenizer.get_chat_template(tools=tools)))
    text, blocks = _render_blocks(messages, tokenizer, tools, return_assistant_tokens_mask=marked)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marked:
        if len(blocks) != len(turns):
            raise RowError(
                f"the chat template marks {len(blocks)} replies with {{% generation %}} where the conversation has "
                f"{len(turns)}; mark each reply once"
            )
        return text, [start for start, _ in blocks]
    prompts = [_render_text(messages[:turn], tokenizer, tools, add_generation_prompt=True) for turn in turns]
    for number, prompt in enumerate(prompts, start=1):
        if not text.startswith(prompt):
            raise RowError(
                f"the prompt of reply {number} is not a prefix of the conversation as the chat template writes it, "
                "so no mask is exact; mark replies in the template with {% generation %} and {% endgeneration %}"
            )
    return text, [len(prompt) for prompt in prompts]


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of the messages with the generation prompt. RowError where the template fails."""
    return _tokenize(_render_text(messages, tokenizer, None, add_generation_prompt=True), tokenizer)


def _render_text(messages: Sequence[Message], tokenizer: Any, tools: list[Any] | None, **options: bool) -> str:
    return _render_blocks(messages, tokenizer, tools, **options)[0]


def _render_blocks(
    messages: Sequence[Message], tokenizer: Any, tools: list[Any] | None, **options: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text as transformers renders it, and [start, end) of each {% generation %} block if they are asked for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)

    def render() -> tuple[list[str], list[list[tuple[int, int]]]]:
        return render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            **options,
            **tokenizer.special_tokens_map,
        )

    try:
        texts, blocks = render_bounded(_compiled(template), render)
        return check_output(texts[0]), blocks[0] if blocks else []
    except Exception as error:  # a template is a program: it divides by zero, adds None to text, asks for a terabyte
        raise RowError(
            f"the chat template refuses the conversation ({reason(error)}); change its turns, or correct the template"
        ) from error


def _compiled(template: str) -> Any:
    """transformers' compiled template, the one that it renders. ValueError of jinja2 for a syntax error."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    # The template writes the special tokens itself, as in transformers' own apply_chat_template.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
