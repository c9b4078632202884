"""Where the replies are in a rendered chat template: the token span that the assistant itself writes, or an error.

A reply starts where the generation prompt ends and runs up to and including the first control token: just what the
model must write at inference, so that it is conditioned on the same tokens as there. Its start is told by the
template's own `{% generation %}` blocks, else by rendering the turns before it with a generation prompt. Both ways
are checked against the whole rendering, in text and in tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAIL = 64  # letters at the end of a reply that must stand before its end token


class RowError(ValueError):
    """What is wrong with a row and what to do; the reader adds the file and the line."""


def load_tokenizer(tokenizer: str) -> Any:
    """A fast tokenizer with a chat template, from a local folder or by name; no code of its folder is run."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no tokenizer at {tokenizer} ({reason}); give a folder that has tokenizer.json") from error
    if not loaded.is_fast:
        raise ValueError(f"the tokenizer at {tokenizer} has no fast version; add its tokenizer.json")
    if not loaded.chat_template:
        raise ValueError(f"the tokenizer at {tokenizer} has no chat template; put a chat_template.jinja beside it")
    return loaded


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of what decides token ids and masks: the tokenizer's own JSON, its special tokens and its chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.get_chat_template()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def reply_spans(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of the whole conversation, and [start, end) of each assistant turn, its end token included."""
    control, control_ids = control_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        if found := control.search(message["content"]):
            raise RowError(f"message {number} has the control token {found[0]!r} in its text; remove it")
    text, starts = _render(messages, tokenizer)
    ids = _tokenize(text, tokenizer)
    spans = []
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    for number, (start, reply) in enumerate(zip(starts, replies, strict=True), start=1):
        end = control.search(text, start)
        if end is None:
            raise RowError(
                f"the chat template writes no control token after reply {number}, so the model would never learn "
                "to stop; add eos_token after the reply in the template"
            )
        if not text[start : end.start()].rstrip().endswith(reply.strip()[-TAIL:]):
            raise RowError(
                f"reply {number} does not stand whole before the first control token of its turn; "
                "begin the template's {% generation %} block where the reply begins"
            )
        head = _tokenize(text[:start], tokenizer)
        if not head or ids[: len(head)] != head:
            raise RowError(
                f"the tokenizer joins the start of reply {number} to the text before it, so no mask is exact; "
                "remove white space at the start of the reply, or change the template's text there"
            )
        last = next(i for i in range(len(head), len(ids)) if ids[i] in control_ids)
        spans.append((len(head), last + 1))
    if len(ends := {ids[end - 1] for _, end in spans}) > 1:  # one of them is the header of the turn that follows
        raise RowError(
            f"the replies end on different control tokens, {tokenizer.convert_ids_to_tokens(sorted(ends))}; "
            "let the template write eos_token after each reply"
        )
    return ids, spans


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> tuple[re.Pattern[str], frozenset[int]]:
    """A pattern that finds any special token in text (the longest one first), and the ids of these tokens."""
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), frozenset(special.values())


def _render(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[str, list[int]]:
    """The rendered conversation and the index of the first letter of each reply."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    marked = bool(GENERATION.search(template))

    def render(turns: Sequence[dict[str, str]], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, blocks = render_jinja_template(
                conversations=[list(turns)], chat_template=template, **options, **tokenizer.special_tokens_map
            )
        except TemplateError as error:
            raise RowError(f"the chat template refuses the conversation ({error}); change its turns") from error
        return texts[0], blocks[0] if blocks else []

    text, blocks = render(messages, return_assistant_tokens_mask=marked)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marked:
        if len(blocks) != len(turns):
            raise RowError(
                f"the chat template marks {len(blocks)} replies with {{% generation %}} where the conversation has "
                f"{len(turns)}; mark each reply once"
            )
        return text, [start for start, _ in blocks]
    prompts = [render(messages[:turn], add_generation_prompt=True)[0] for turn in turns]
    for number, prompt in enumerate(prompts, start=1):
        if not text.startswith(prompt):
            raise RowError(
                f"the prompt of reply {number} is not a prefix of the conversation as the chat template writes it, "
                "so no mask is exact; mark replies in the template with {% generation %} and {% endgeneration %}"
            )
    return text, [len(prompt) for prompt in prompts]


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    # The template writes the special tokens itself, as in transformers' own apply_chat_template.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
