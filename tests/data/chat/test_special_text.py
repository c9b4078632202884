"""Text that looks like a control token: refused, or encoded as plain text by tokenizers of both kinds."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.chat.conversation import Conversation, encode_samples
from megatron_sfr.data.chat.loss_mask import prompt_ids
from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import reply, runs, user
from tests.data.records import CHATML


@pytest.fixture(scope="module")
def chatml(make_tokenizer):
    return load_tokenizer(str(make_tokenizer(CHATML)))


def unigram() -> PreTrainedTokenizerFast:
    """Pieces as sentencepiece writes them: the control tokens are pieces too, blanks are characters."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(letter, -3.0) for letter in "▁<>/sabcdegiklt:\n"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<unk>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}:{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    return fast


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_text_like_a_control_token_is_refused_or_plain_text(chatml, kind: str):
    tokenizer, token = (chatml, "<|im_end|>") if kind == "byte-level" else (unigram(), "</s>")
    messages = [user(f"is {token} a tag"), reply(f"it is a {token} tag")]
    special = tokenizer.convert_tokens_to_ids(token)

    with pytest.raises(RecordError, match=r"has the control token .*; remove it, or give --special-text literal"):
        runs(tokenizer, messages)
    (sample,) = encode_samples(Conversation("f", 1, messages, None), tokenizer, SampleOptions(special_text="literal"))

    (start, end) = sample.replies[0]
    spelled = tokenizer.decode(sample.tokens[start : end - 1], skip_special_tokens=True)
    assert spelled.strip() == f"it is a {token} tag"
    assert sample.tokens[start:end].tolist().count(special) == 1, "the end token alone"
    prompt = prompt_ids(messages[:1], tokenizer, TemplateOptions(special_text="literal"))
    assert sample.tokens[:start].tolist() == prompt
    other = [user("is it a tag"), reply("it is a tag")]
    (plain,) = encode_samples(Conversation("f", 1, other, None), tokenizer, SampleOptions())
    (literal,) = encode_samples(Conversation("f", 1, other, None), tokenizer, SampleOptions(special_text="literal"))
    assert literal.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("special_text", ["refuse", "literal"])
def test_marks_of_thoughts_are_not_control_tokens(make_tokenizer, special_text: str):
    tokenizer = load_tokenizer(str(make_tokenizer(CHATML)))
    marks = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|channel|>", *marks]})
    thought = "<think>\nHm.\n</think>\n\nIt is."

    messages = [user("the sea"), reply(thought), user("the sky"), reply(thought)]

    assert runs(tokenizer, messages, special_text=special_text) == [[thought + "<|im_end|>"] * 2]
    options = SampleOptions(special_text=special_text)
    (sample,) = encode_samples(Conversation("f", 1, messages, None), tokenizer, options)
    assert all(sample.tokens.tolist().count(id) == 2 for id in tokenizer.convert_tokens_to_ids(marks))
