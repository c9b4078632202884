"""Tokenizers with the chat templates of published models, and conversations of every kind that these may have."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.chat.conversation import Conversation, encode_samples
from megatron_sfr.data.chat.template_options import SampleOptions

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = re.compile(r"<seed:(?:bos|eos|pad)>|<\|[a-z_]+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>")
ENDS = {
    "qwen": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "phi-3": "<|endoftext|>",
    "phi-4": "<|im_end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "mistral": "</s>",
    "mixtral": "</s>",
    "glm": "<|endoftext|>",
    "seed-oss": "<seed:eos>",
    "smollm3": "<|im_end|>",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "the tide",
            "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "when"}}},
        },
    }
]
Message = dict[str, Any]


def tokenizer_of(family: str, bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens of this template."""
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    end = next(token for name, token in ENDS.items() if family.startswith(name))
    control = sorted({*CONTROL.findall(template), end, "<s>", "<|im_start|>", "<|end|>"})
    copy = Tokenizer.from_str(bpe.to_str())
    copy.add_special_tokens(control)
    plain = {"<think>", "</think>", *re.findall(r"</?seed:[a-z_]+>", template)} - set(control)
    copy.add_tokens([AddedToken(token, special=False, normalized=False) for token in sorted(plain)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy,
        bos_token="<s>",
        eos_token=end,
        additional_special_tokens=[token for token in control if token not in (end, "<s>")],
    )
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def reply(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content} | more


def called(arguments: Any) -> list[Message]:
    return [{"id": "a1b2c3d4e", "type": "function", "function": {"name": "tide", "arguments": arguments}}]


ANSWER = "The sea is blue because water absorbs the red part of sunlight and scatters the rest of it, mostly."
SYSTEM = {"role": "system", "content": "Be terse."}
RESULT = {"role": "tool", "name": "tide", "tool_call_id": "a1b2c3d4e", "content": "high"}
THOUGHT = "<think>\nFirst I look at it.\n</think>\n\n"
PLAIN = [user("the sea"), reply(ANSWER), user("and the sky"), reply("It is grey.")]
KINDS: dict[str, list[Message]] = {
    "one": PLAIN[:2],
    "several": PLAIN,
    "system": [SYSTEM, *PLAIN],
    "reasoning": [user("the sea"), reply(ANSWER, reasoning_content="First I look at it.")],
    "reasonings": [
        user("the sea"),
        reply(ANSWER, reasoning_content="First I look at it."),
        user("and the sky"),
        reply("It is grey.", reasoning_content="Hm."),
    ],
    "thought": [user("the sea"), reply(THOUGHT + ANSWER)],
    "thoughts": [user("the sea"), reply(THOUGHT + ANSWER), user("and the sky"), reply(THOUGHT + "It is grey.")],
    "tools": [user("the tide"), reply("", tool_calls=called({"at": "noon"})), RESULT, reply("It is high.")],
    "null": [user("the tide"), reply(None, tool_calls=called('{"at": "noon"}')), RESULT, reply("It is high.")],
    "late tools": [
        *PLAIN[:2],
        user("the tide"),
        reply("", tool_calls=called({"at": "noon"})),
        RESULT,
        reply("It is high."),
    ],
}
WITH_TOOLS = ("tools", "null", "late tools")


def runs(tokenizer, messages, *, persona=None, tools=None, untrained=(), **options) -> list[list[str]]:
    """The supervised text of each sample, run by run."""
    conversation = Conversation("f", 1, list(messages), persona, tools, frozenset(untrained))
    samples = encode_samples(conversation, tokenizer, SampleOptions(**options))
    for sample in samples:
        assert sample.loss_mask.sum() == sum(end - start for start, end in sample.replies)
    return [[tokenizer.decode(sample.tokens[a:b]) for a, b in sample.replies] for sample in samples]
