"""Assistant masks: exact by hand, equal by both ways of finding replies, refused where no exact mask exists."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.chat.conversation import Conversation, encode
from megatron_sfr.data.chat.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_sfr.storage.jsonl import RecordError
from tests.data.records import CHATML, turns

HEADER = "{{ '<|im_start|>assistant\n' }}"
LOOP = "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}" + HEADER + "{% endif %}"
REPLY = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
MARKED = LOOP + "{% else %}" + HEADER + REPLY + "{{ '\n' }}" + PROMPT
TEMPLATES = {
    "prefixes": CHATML,
    "marked": MARKED,
    "marked, end left out": MARKED.replace("<|im_end|>{% endgeneration %}", "{%- endgeneration -%}<|im_end|>"),
    "marked, line end too": MARKED.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}"),
    "marked, in parts": MARKED.replace("<|im_end|>{%", "{% endgeneration %}{% generation %}<|im_end|>{%"),
    "marked, header too": MARKED.replace(HEADER + "{% generation %}", "{% generation %}" + HEADER),
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
}
# As Qwen3's: the last reply opens with an empty thought, which earlier ones lose.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoded(tokenizer, *contents: str):
    return encode(Conversation("f", 1, turns(*contents), None), tokenizer)


def pieces(tokenizer, result) -> tuple[list[str], str]:
    """The supervised runs as text, and the rest with a bar where they were."""
    runs = [tokenizer.decode(result.tokens[start:end]) for start, end in result.replies]
    text, rest = tokenizer.decode(result.tokens), ""
    for run in runs:
        before, text = text.split(run, 1)
        rest += before + "|"
    return runs, rest + text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_each_reply_and_its_end_token_is_supervised_and_nothing_else(make_tokenizer, template: str):
    tokenizer = load_tokenizer(str(make_tokenizer(template)))

    result = encoded(tokenizer, "is the sea blue", "yes, the sea is blue", "sure", "yes")

    runs, rest = pieces(tokenizer, result)
    assert runs == ["yes, the sea is blue<|im_end|>", "yes<|im_end|>"]
    assert rest == (
        "<|im_start|>user\nis the sea blue<|im_end|>\n<|im_start|>assistant\n|\n"
        "<|im_start|>user\nsure<|im_end|>\n<|im_start|>assistant\n|\n"
    )
    ends = [end - 1 for _, end in result.replies]
    assert (result.tokens[ends] == tokenizer.pad_token_id).all(), "the end token is supervised though it is the padding"
    expected = np.zeros(len(result.tokens), np.uint8)
    for start, end in result.replies:
        expected[start:end] = 1
    assert (result.loss_mask == expected).all()
    whole = tokenizer.apply_chat_template(turns("is the sea blue", "yes, the sea is blue", "sure", "yes"))
    assert result.tokens.tolist() == whole["input_ids"]


def test_the_mask_equals_one_written_by_hand():
    words = ["<s>", "</s>", "<u>", "<a>", "one", "two", "three"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<u>", "<a>"],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<u> {{ m.content }} {% else %}"
        "<a> {{ m.content }} </s>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )

    result = encoded(tokenizer, "one two", "three", "two", "one one")

    assert result.tokens.tolist() == [0, 2, 4, 5, 3, 6, 1, 2, 5, 3, 4, 4, 1]
    assert result.loss_mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert result.replies == ((5, 7), (10, 13))


def test_a_marked_template_gives_transformers_own_mask(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(MARKED)))
    contents = ("the sky", "yes, the sky", "the sea", "the sea is grey")
    own = tokenizer.apply_chat_template(turns(*contents), return_dict=True, return_assistant_tokens_mask=True)

    result = encoded(tokenizer, *contents)

    assert result.tokens.tolist() == own["input_ids"]
    assert result.loss_mask.tolist() == own["assistant_masks"]


def test_a_thought_that_only_the_last_reply_has_is_supervised_there(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(THINKING)))

    runs, _ = pieces(tokenizer, encoded(tokenizer, "the sea", "is blue", "the sky", "is grey"))

    assert runs == ["is blue<|im_end|>", "<think>\n\n</think>\n\nis grey<|im_end|>"]


def test_the_prompt_has_the_tokens_of_inference(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(THINKING)))
    messages = turns("the sea", "is blue", "the sky", "is grey")

    result = encode(Conversation("f", 1, messages, None), tokenizer)

    for turn, (start, _) in zip((1, 3), result.replies, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert result.tokens[:start].tolist() == prompt


REFUSED = {
    "line end joins the header": (CHATML, ("hi", "\n\nyes"), "the tokenizer joins '\\n' before reply 1 with '\\n' at"),
    "control token": (CHATML, ("hi <|im_end|>", "yes"), "message 1 has the control token '<|im_end|>'"),
    "no end token": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ("hi", "yes"),
        "no control token after reply 1",
    ),
    "an end token for the last reply alone": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        ("hi", "yes", "hi", "yes"),
        "the replies end on different control tokens, ['<|im_start|>', '<|im_end|>']",
    ),
    "reply changed": (
        CHATML.replace("m.content", "m.content | upper"),
        ("hi", "yes"),
        "rewrites reply 1; give --turns",
    ),
    "beginning dropped": (
        CHATML.replace("m.content", "m.content.split(',')[-1]"),
        ("hi", "well, yes"),
        "the chat template leaves out the beginning of reply 1 ('well, yes'); give --turns each",
    ),
    "no prefix": (
        "{{ messages | length }}" + CHATML,
        ("hi", "yes", "hi", "yes"),
        "the prompt of reply 1 at inference is not a prefix",
    ),
    "one mark for all": (
        "{% generation %}" + CHATML + "{% endgeneration %}",
        ("hi", "yes", "hi", "yes"),
        "marks 1 replies with {% generation %} where the conversation has 2",
    ),
    "mark too late": (
        MARKED.replace("{% generation %}", "yes, {% generation %}"),
        ("hi", "yes"),
        "block of reply 1 begins after 'yes,', which the model has to write too; begin the block where",
    ),
    "template refuses": (
        "{{ raise_exception('no more than one turn') }}",
        ("hi", "yes"),
        "the chat template refuses the conversation (no more than one turn)",
    ),
    "template divides by 0": ("{{ 1 // 0 }}", ("hi", "yes"), "(ZeroDivisionError: "),
}


@pytest.mark.parametrize(("template", "contents", "reason"), REFUSED.values(), ids=REFUSED)
def test_records_without_an_exact_mask_are_refused(
    make_tokenizer, template: str, contents: tuple[str, ...], reason: str
):
    tokenizer = load_tokenizer(str(make_tokenizer(template)))

    with pytest.raises(RecordError, match=re.escape(reason)):
        encoded(tokenizer, *contents)


def test_refuses_a_tokenizer_that_cannot_do(make_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has no chat template; put a chat_template"):
        load_tokenizer(str(make_tokenizer(None)))
    with pytest.raises(ValueError, match=r"no tokenizer that can be read at .*; give a folder") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"the chat template of the tokenizer at .* cannot be used \(TemplateSyntaxE"):
        load_tokenizer(str(make_tokenizer("{% for %}")))


def test_the_hash_follows_the_template_and_not_the_folder(make_tokenizer):
    one, same, other = (make_tokenizer(template) for template in (CHATML, CHATML, THINKING))

    hashes = [tokenizer_sha256(load_tokenizer(str(folder))) for folder in (one, same, other)]

    assert hashes[0] == hashes[1] != hashes[2]
