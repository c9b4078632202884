"""Records are rendered and encoded in groups, which changes neither samples nor reasons nor their order."""

import json

import numpy as np
import pytest

from megatron_sfr.data.chat import chat_template, conversation
from megatron_sfr.data.chat.chat_template import ChatTemplate
from megatron_sfr.data.chat.conversation import encode_conversations, encode_samples, parse_record
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.prepare.encode_documents import TOKENS, TextEncoder
from megatron_sfr.data.segments.anchors import Cut
from megatron_sfr.storage.jsonl import Chunk, Position, Record, RecordError
from tests.data.chat.families import KINDS, PLAIN, SYSTEM, TOOLS, WITH_TOOLS, tokenizer_of
from tests.data.records import turns

SAID = "the sea is blue and the sky is grey "
LONG = [{"messages": [SYSTEM, *turns("the sea", SAID * 9, "and the sky", SAID * i)]} for i in (7, 8, 9)]
MIXED = [
    *({"messages": messages} | ({"tools": TOOLS} if kind in WITH_TOOLS else {}) for kind, messages in KINDS.items()),
    {"messages": []},
    {"messages": turns("as <|im_end|> says", "yes"), "persona": "calm"},
    {"messages": turns("the sea", "\n\nblue  ", "and", "<think>")},
    {"messages": [{**message, "train": False} if message["role"] == "assistant" else message for message in PLAIN]},
]


def parsed(records):
    """Each record's conversation, or why it has none."""
    for line, fields in enumerate(records, start=1):
        try:
            yield parse_record(Record("f", line, json.dumps(fields).encode()))
        except RecordError as error:
            yield error


def outcome(samples):
    if isinstance(samples, RecordError):
        return str(samples)
    return [(x.tokens.tolist(), x.loss_mask.tolist(), x.replies, x.unlike_last, x.unlike_inference) for x in samples]


def alone(given, tokenizer, options):
    """The outcome of a conversation by itself."""
    try:
        return outcome(given if isinstance(given, RecordError) else encode_samples(given, tokenizer, options))
    except RecordError as error:
        return str(error)


@pytest.mark.parametrize("how", ["together", "each", "last", "as-rendered"])
@pytest.mark.parametrize("special_text", ["refuse", "literal"])
@pytest.mark.parametrize("family", ["qwen3", "mistral-large-2407", "deepseek-r1"])
def test_a_conversation_is_the_same_in_a_group_and_alone(monkeypatch, bpe, family: str, how: str, special_text: str):
    tokenizer, options = tokenizer_of(family, bpe), SampleOptions(turns=how, special_text=special_text)
    expected = [alone(given, tokenizer, options) for given in parsed(MIXED)]
    kinds = set(map(type, expected))
    assert kinds == {str, list}  # some records have samples, some a reason
    for characters in (1, 300, 1 << 18):
        monkeypatch.setattr(conversation, "GROUP_CHARACTERS", characters)
        assert [outcome(made) for made in encode_conversations(parsed(MIXED), tokenizer, options)] == expected


@pytest.mark.parametrize(("how", "encoded"), [("together", 1), ("each", 2), ("last", 1)])
def test_texts_are_rendered_once_and_encoded_once_after_the_last_rendering_of_their_group(
    monkeypatch, bpe, how: str, encoded: int
):
    """A conversation has one text for each sample, and a prompt for each reply of them."""
    steps: list[str] = []
    render, encode = ChatTemplate._render, chat_template.encode_text

    def seen(step, function):
        return lambda *args, **options: (steps.append(step), function(*args, **options))[1]

    tokenizer = tokenizer_of("qwen2.5", bpe)
    list(encode_conversations(parsed(LONG), tokenizer, SampleOptions(turns=how)))  # short headers are remembered
    monkeypatch.setattr(ChatTemplate, "_render", seen("render", render))
    monkeypatch.setattr(chat_template, "encode_text", seen("encode", encode))
    list(encode_conversations(parsed(LONG), tokenizer, SampleOptions(turns=how)))
    renderings = {"together": 3, "each": 4, "last": 2}[how]
    assert steps == ["render"] * renderings * len(LONG) + ["encode"] * encoded * len(LONG)


def test_a_group_ends_with_the_characters_that_it_may_hold(monkeypatch, bpe):
    """So memory does not grow with the number of records: a second group is read once the first is taken."""
    monkeypatch.setattr(conversation, "GROUP_CHARACTERS", 1)
    read = []
    given = (read.append(line) or made for line, made in enumerate(parsed(LONG)))
    samples = encode_conversations(given, tokenizer_of("qwen2.5", bpe))
    for n in range(len(LONG)):
        next(samples)
        assert read == list(range(n + 1))


def test_documents_keep_their_order_around_bad_records(bpe):
    """The tokens are those of the tokenizer's own call."""
    tokenizer = tokenizer_of("qwen2.5", bpe)
    texts = [SAID, "", f"{SAID}é雪\n\n\n", "as <|im_end|> says", "yes"]
    lines = [*(json.dumps({"text": text}) for text in texts), "{broken", json.dumps({"text": SAID * 40})]
    chunk = Chunk("f", 1, "\n".join(lines).encode(), Position())
    made = TextEncoder(tokenizer, 3, "text", Cut(4, [(1, 12)], 4))(chunk)
    assert [bad.record.line for bad in made.bad] == [2, 4, 6]
    kept = [texts[0], texts[2], texts[4], SAID * 40]
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 3] for text in kept]
    assert made.lengths.tolist() == [len(tokens) for tokens in expected]
    assert made.columns[TOKENS].tolist() == np.concatenate(expected).tolist()
