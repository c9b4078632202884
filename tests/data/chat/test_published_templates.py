"""The chat templates of published models: what each accepts, and that prompts and replies are those of inference."""

import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sfr.data.chat.chat_template import ChatTemplate
from megatron_sfr.data.chat.conversation import Conversation, Encoded, encode_samples
from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import KINDS, TOOLS, WITH_TOOLS, tokenizer_of
from tests.data.chat.family_table import LIMITS, OPTIONS, table


@pytest.fixture(scope="module", params=LIMITS)
def family(request, bpe):
    return request.param, tokenizer_of(request.param, bpe)


def samples(tokenizer, kind: str, turns: str, **options) -> list[Encoded]:
    conversation = Conversation("f", 1, KINDS[kind], None, TOOLS if kind in WITH_TOOLS else None)
    return encode_samples(conversation, tokenizer, SampleOptions(turns=turns, **options))


def check(tokenizer, kind: str, turns: str, found: list[Encoded]) -> None:
    """Each trained reply follows the tokens of the template's own generation prompt and holds all that was said."""
    tools = TOOLS if kind in WITH_TOOLS else None
    messages = KINDS["tools" if kind == "null" else kind]  # null content and a JSON string say the same
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(sample, span) for sample in found for span in sample.replies]
    for turn, (sample, (start, end)) in zip(replies[-len(spans) :], spans, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], tools=tools, add_generation_prompt=True)["input_ids"]
        assert sample.tokens[:start].tolist() == prompt
        text = tokenizer.decode(sample.tokens[start:end])
        content, reasoning = messages[turn]["content"] or "", messages[turn].get("reasoning_content", "")
        for part in (*content.removeprefix("<think>").split("</think>"), reasoning):
            assert part.strip() in text
        assert sample.loss_mask[start:end].all()
        assert sample.loss_mask[:start].sum() == sum(b - a for a, b in sample.replies if b <= start)
    assert len(spans) == (1 if turns == "last" else len(replies))
    assert all(len(sample.replies) == 1 for sample in found) or turns == "together"


@pytest.mark.parametrize("turns", ["together", "each", "last"])
def test_every_accepted_reply_follows_the_prompt_of_inference_and_is_complete(family, turns: str):
    name, tokenizer = family
    options = OPTIONS.get(name, {})
    for kind in KINDS:
        limit = LIMITS[name].get(kind)
        if limit is None or (limit == "each" and turns != "together"):
            check(tokenizer, kind, turns, samples(tokenizer, kind, turns, **options))
        else:
            remedy = "; give --turns each (one sample for each reply, after its own prompt)"
            with pytest.raises(RecordError) as caught:
                samples(tokenizer, kind, turns, **options)
            reason = re.sub(r"reply \d", "reply 1", str(caught.value))
            assert (remedy if limit == "each" else limit) in reason, kind


def test_renderings_are_those_of_transformers(family):
    """Finished conversations, prompts, and the blocks of marked templates; a date and variables too."""
    _, tokenizer = family
    template = ChatTemplate(tokenizer, TemplateOptions())
    for kind, messages in KINDS.items():
        tools = TOOLS if kind in WITH_TOOLS else None
        how = {"tools": tools, "chat_template": tokenizer.get_chat_template(tools=tools)} | tokenizer.special_tokens_map
        try:
            texts, blocks = render_jinja_template([messages], return_assistant_tokens_mask=True, **how)
            prompts, _ = render_jinja_template([messages[:1]], add_generation_prompt=True, **how)
        except Exception:
            with pytest.raises(RecordError, match="refuses the conversation"):
                template.blocks(messages, tools)
            continue
        assert template.blocks(messages, tools) == (texts[0], blocks[0])
        assert template.text(messages, tools) == texts[0]
        assert template.text(messages[:1], tools, prompt=True) == prompts[0]


def test_an_earlier_reply_without_the_last_ones_empty_thought_is_counted(bpe):
    tokenizer = tokenizer_of("qwen3", bpe)

    (whole,) = samples(tokenizer, "several", "together")
    apart = samples(tokenizer, "several", "each")

    assert whole.unlike_last == 1
    assert [sample.unlike_last for sample in apart] == [0, 0]
    for sample in apart:
        start, end = sample.replies[0]
        assert tokenizer.decode(sample.tokens[start:end]).startswith("<think>\n\n</think>\n\n")
    assert samples(tokenizer, "reasoning", "together")[0].unlike_last == 0


def test_as_rendered_trains_what_the_template_writes_and_counts_it(bpe):
    for name, kind, unlike in (("qwen3", "thoughts", 1), ("deepseek-r1", "thought", 1), ("qwen2.5", "thoughts", 0)):
        (sample,) = samples(tokenizer_of(name, bpe), kind, "as-rendered")
        assert sample.unlike_inference == unlike, name
    (sample,) = samples(tokenizer_of("mistral-nemo-marked", bpe), "late tools", "as-rendered")
    assert sample.unlike_inference == 1  # the first reply: inference had shown it the tools


def test_a_persona_can_be_written_in_the_user_turn_of_every_template_that_ends_its_replies(family):
    name, tokenizer = family
    if LIMITS[name].get("one") is None:
        conversation = Conversation("f", 1, KINDS["system"], None)
        (sample,) = encode_samples(conversation, tokenizer, SampleOptions(persona_as="user", **OPTIONS.get(name, {})))
        assert "Be terse.\n\nthe sea" in tokenizer.decode(sample.tokens)


def test_the_documentation_has_the_table_of_these_limits():
    page = Path(__file__).parents[3] / "docs" / "data.md"
    assert table() in page.read_text(encoding="utf-8"), "run: python -m tests.data.chat.family_table"
