"""Prompts are rendered the same with every version of transformers, also with the earlier one that vLLM requires."""

import pytest
from transformers.utils import chat_template_utils

from megatron_sfr.data.chat.chat_template import REASONING, ChatTemplate, with_all_reasoning_names
from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.demo.train_tokenizer import train_tokenizer

NEW = "_alias_reasoning_fields"
QUESTION = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "So."}


def test_reasoning_has_the_names_of_transformers() -> None:
    for name in REASONING:
        found = with_all_reasoning_names({**REPLY, name: "Hm."})
        assert (found["reasoning_content"], found["thinking"]) == ("Hm.", "Hm.")
        if hasattr(chat_template_utils, NEW):
            assert found == getattr(chat_template_utils, NEW)([{**REPLY, name: "Hm."}])[0]
    assert with_all_reasoning_names(REPLY) == REPLY


def test_a_version_without_these_names_renders_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(train_tokenizer(["Why? So."], 300), TemplateOptions())
    text = template.text([QUESTION, REPLY], None)
    monkeypatch.delattr(chat_template_utils, NEW, raising=False)  # as in transformers 5.19
    assert template.text([QUESTION, REPLY], None) == text
    assert "Why?" in text
