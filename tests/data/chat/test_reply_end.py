"""Templates that write no token after a reply (`--reply-end next-turn`), or mark reasoning in another way."""

import pytest

from megatron_sfr.data.chat.conversation import Conversation, encode_samples
from megatron_sfr.data.chat.loss_mask import prompt_ids, reply_end_token
from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.evaluation.generate.end_token_warning import unknown_end
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import ANSWER, KINDS, PLAIN, SYSTEM, TOOLS, reply, runs, tokenizer_of, user
from tests.data.records import CHATML, turns

NEXT = {"reply_end": "next-turn"}
NO_END = CHATML.replace("<|im_end|>", "")
PUBLISHED_SMOLLM3 = (  # its marks include the header, its system turn stays open, and it writes the date
    "<|im_start|>system\n{{ strftime_now('%d %B %Y') }}\n\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}\n\n{% for m in messages %}{% if m.role == 'user' %}"
    "<|im_start|>user\n{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}{% generation %}"
    "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ends_of(tokenizer, kind: str) -> list[str]:
    conversation = Conversation("f", 1, KINDS[kind], None, TOOLS if "tools" in kind else None)
    (sample,) = encode_samples(conversation, tokenizer, SampleOptions(**NEXT))
    special = set(tokenizer.all_special_ids)
    supervised = [int(id) for id in sample.tokens[sample.loss_mask == 1] if id in special]
    ends = [int(sample.tokens[end - 1]) for _, end in sample.replies]
    assert supervised == ends, "each reply has one end token, and no other control token is supervised"
    return tokenizer.convert_ids_to_tokens(ends)


def test_a_reply_ends_on_the_token_of_the_turn_after_it(bpe):
    tokenizer = tokenizer_of("glm-4.5", bpe)

    assert ends_of(tokenizer, "several") == ["<|user|>", "<|user|>"]
    assert ends_of(tokenizer, "late tools") == ["<|user|>", "<|observation|>", "<|user|>"]


def test_the_refusal_names_the_token_and_its_remedy_works(bpe):
    tokenizer = tokenizer_of("glm-4-0414", bpe)

    for how in ("together", "each", "as-rendered"):
        with pytest.raises(RecordError, match=r"if the model stops at <\|user\|> .*, give --reply-end next-turn"):
            runs(tokenizer, PLAIN, turns=how)
        texts = [text for sample in runs(tokenizer, PLAIN, turns=how, **NEXT) for text in sample]
        assert texts == [f"\n{ANSWER}<|user|>", "\nIt is grey.<|user|>"]
    with pytest.raises(RecordError, match=r"no control token after the tool calls of message 2.*--reply-end next-turn"):
        runs(tokenizer_of("glm-4.5", bpe), KINDS["tools"][:2], tools=TOOLS)


def test_a_reply_that_another_follows_does_not_end_on_its_header(bpe):
    tokenizer = tokenizer_of("glm-4-0414", bpe)
    messages = [user("the sea"), reply("Blue."), reply("It is blue.")]

    with pytest.raises(RecordError, match=r"end on different control tokens.*give --turns each"):
        runs(tokenizer, messages, **NEXT)
    assert runs(tokenizer, messages, turns="each", **NEXT) == [["\nBlue.<|user|>"], ["\nIt is blue.<|user|>"]]


def test_an_end_token_of_the_template_is_kept_and_text_alone_ends_nothing(make_tokenizer):
    ended = load_tokenizer(str(make_tokenizer(CHATML)))
    assert runs(ended, PLAIN, **NEXT) == runs(ended, PLAIN)
    unended = load_tokenizer(str(make_tokenizer(NO_END)))
    assert runs(unended, PLAIN[:2], **NEXT) == [[f"{ANSWER}\n<|im_start|>"]]
    unended.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    with pytest.raises(RecordError, match=r"add eos_token after the reply in the template$"):
        runs(unended, PLAIN[:2], **NEXT)
    with pytest.raises(ValueError, match="reply_end is 'user'; choose template, next-turn"):
        TemplateOptions(reply_end="user")


def test_a_model_that_does_not_stop_at_the_next_turn_is_reported(bpe):
    tokenizer = tokenizer_of("glm-4.5", bpe)
    at_next_turn = TemplateOptions(**NEXT)
    header = tokenizer.convert_tokens_to_ids("<|user|>")

    assert reply_end_token(tokenizer) is None
    assert reply_end_token(tokenizer, at_next_turn) == header
    assert unknown_end(tokenizer, [header], at_next_turn) is None
    warning = unknown_end(tokenizer, [tokenizer.eos_token_id], at_next_turn)
    assert warning is not None
    assert warning.startswith("the chat template ends replies on <|user|>, which is not")


def test_a_thought_in_marks_that_the_template_does_not_use_is_refused(bpe):
    tokenizer = tokenizer_of("seed-oss", bpe)

    with pytest.raises(RecordError, match=r"reply 2 has a thought in <think>.*'<seed:think>'; give the thought as rea"):
        runs(tokenizer, [*PLAIN, user("why"), reply("<think>Hm.</think>So.")][2:], turns="last")
    expected = [["<seed:think>First I look at it.</seed:think>\n" + ANSWER + "<seed:eos>"]]
    assert runs(tokenizer, KINDS["reasoning"]) == expected
    assert runs(tokenizer, [user("hi"), reply("<seed:think>Hm.</seed:think>\nSo.")]) == [
        ["<seed:think>Hm.</seed:think>\nSo.<seed:eos>"]
    ]


@pytest.mark.parametrize("system", ["Be terse. /no_think", "/no_think", "/think Be terse."])
def test_a_switch_in_the_system_turn_selects_the_mode(bpe, system: str):
    tokenizer = tokenizer_of("smollm3-unsloth", bpe)
    messages = [{"role": "system", "content": system}, *PLAIN]
    prompt = tokenizer.decode(prompt_ids(messages[:2], tokenizer))

    assert ("Reasoning Mode: /no_think" in prompt) == ("/no_think" in system)
    assert runs(tokenizer, messages) == [[ANSWER + "<|im_end|>", "It is grey.<|im_end|>"]]
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}" + CHATML[26:]
    with pytest.raises(RecordError, match="does not write the system turn"):
        runs(tokenizer, messages)


def test_marks_that_include_the_header_and_an_open_system_turn(make_tokenizer):
    marked = load_tokenizer(str(make_tokenizer(PUBLISHED_SMOLLM3)))
    messages = [SYSTEM, *turns("the sea", "is blue", "the sky", "is grey")]
    expected = [["is blue<|im_end|>", "is grey<|im_end|>"]]

    assert runs(marked, messages) == expected
    assert "26 July 2024" in marked.decode(prompt_ids(messages[:2], marked))
    assert [len(sample) for sample in runs(marked, messages, turns="each")] == [1, 1]
