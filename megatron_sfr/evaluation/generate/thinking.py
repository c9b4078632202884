"""Removes thoughts, `<think>...</think>` and in other marks, from replies before scoring."""

import re

from megatron_sfr.data.chat.rendered_turns import EMPTY_THOUGHT

MARKS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
"""Of most models, of Seed-OSS, of Magistral."""


def without_empty_thought(reply: str) -> str:
    """The reply without an empty thought at its start, which some templates make a model write (Qwen3).

    Its opening tag may be part of the prompt.
    """
    found = EMPTY_THOUGHT.match(reply)
    return reply[found.end() :] if found else reply


def without_thoughts(reply: str) -> str:
    """The reply without its thoughts and the blank lines after them; a thought that is cut off ends the reply.

    A closing tag without an opening one ends a thought that began in the prompt.
    """
    text = reply
    for opening, closing in MARKS:
        text = re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", "", text, flags=re.DOTALL)
        text = text.rpartition(closing)[2].partition(opening)[0]
    return re.sub(r"\A(?:[ \t]*\n)+", "", text) if text != reply else text
