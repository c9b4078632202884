"""A reply that the chat template does not write as the model does: the content itself, after the prompt of inference.

Templates are made for prompts. Some drop the reasoning of every reply (DeepSeek-R1), or write a finished conversation
without the system turn that the prompt has (Mistral v3). The model never reads that: at inference it is given the
prompt and writes the reply, which is what `--turns each` and `--turns last` train then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_sfr.data.chat.chat_template import MARK, ChatTemplate
from megatron_sfr.data.chat.rendered_turns import END_THINK, OPEN_THOUGHT, THINK, no_end, reasoning_of
from megatron_sfr.data.chat.template_options import variables_of
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.storage.jsonl import RecordError

CLOSED_THOUGHT = re.compile(rf"{END_THINK}\s*\Z")


def after_prompt(
    template: ChatTemplate, messages: Sequence[Message], reply: Message, tools: list[Any] | None, number: int, why: str
) -> tuple[str, tuple[int, int]]:
    """The prompt for `messages`, the reply and its end token as text, and [start, end) of the end token in it.

    The template still decides what opens and ends a reply. why: what is wrong with its own rendering of this one.
    """
    prompt = template.text(messages, tools, prompt=True)
    thought = OPEN_THOUGHT.search(prompt)
    if thought and not reasoning_of(reply)[1]:
        check_open_thought(template, reply.get("content") or "", reply, number)
    own_thought = (reply.get("content") or "").lstrip().startswith(THINK) or reasoning_of(reply)[1]
    if own_thought and CLOSED_THOUGHT.search(prompt):
        raise RecordError(
            f"the generation prompt closes the thought before reply {number}, which has another one; leave it out, or "
            "let the template think (--template-kwargs)"
        )
    if reply.get("tool_calls"):
        raise RecordError(
            f"{why}; use a template that writes tool calls after its generation prompt, or leave tools out"
        )
    if name := reasoning_of(reply)[1]:
        raise RecordError(f"{why}; write {name} at the start of the content as {THINK}...{END_THINK}, or leave it out")
    before, after = _around_reply(template, messages, tools, number)
    content = reply["content"]
    if thought:
        opening = ""
        if content.lstrip().startswith(THINK):
            content = content.lstrip().removeprefix(THINK).removeprefix(thought[0].removeprefix(THINK))
    else:
        opening = _opening(template, prompt, before)
        opening = "" if THINK in opening and END_THINK in content else opening
    end = template.control.search(after)
    if end is None:
        raise RecordError(no_end(template, reply, number))
    end = template.end_of_turn(after, end)
    start = len(prompt) + len(opening) + len(content)
    return prompt + opening + content + after, (start + end.start(), start + end.end())


def check_open_thought(template: ChatTemplate, text: str, reply: Message, number: int) -> None:
    """RecordError where the text of a reply does not close the thought that the generation prompt opens."""
    if END_THINK not in text:
        raise RecordError(
            f"the generation prompt opens a thought and reply {number} has none; {_give_thought(template, reply)}"
        )


def _give_thought(template: ChatTemplate, reply: Message) -> str:
    calls = reply.get("tool_calls")
    give = "give the turn its reasoning_content" if calls else f"begin the reply with {THINK}...{END_THINK}"
    if "enable_thinking" in variables_of(template.tokenizer) - template.options.template_kwargs.keys():
        return give + ", or --template-kwargs '{\"enable_thinking\": false}'"
    return give + ", which may be empty"


def _around_reply(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, number: int
) -> tuple[str, str]:
    """What the template writes before and after a short reply to these messages."""
    text = template.text([*messages, {"role": "assistant", "content": MARK}], tools)
    before, found, after = text.rpartition(MARK)
    if not found:
        raise RecordError(f"the chat template does not write reply {number} at all; correct the template")
    return before, after


def _opening(template: ChatTemplate, prompt: str, before: str) -> str:
    """What stands between the generation prompt and a reply: here, or else in the shortest conversation."""
    if before.startswith(prompt):
        return before[len(prompt) :]
    question = [{"role": "user", "content": "Hi"}]
    try:
        shortest = template.text(question, None, prompt=True)
        before, _ = _around_reply(template, question, None, 1)
    except RecordError:
        return ""
    return before[len(shortest) :] if before.startswith(shortest) else ""
