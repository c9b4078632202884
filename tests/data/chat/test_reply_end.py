"""Templates that write no token after a reply (`--reply-end next-turn`), or mark reasoning in another way."""

import pytest

from megatron_sfr.data.chat.conversation import Conversation, encode_samples
from megatron_sfr.data.chat.loss_mask import prompt_ids, reply_end_token
from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.evaluation.generate.end_token_warning import unknown_end
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import (
    ANSWER,
    KINDS,
    PLAIN,
    RESULT,
    SYSTEM,
    TOOLS,
    called,
    reply,
    runs,
    tokenizer_of,
    user,
)
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


def test_the_next_turn_is_found_although_the_reply_before_it_is_written_in_another_way(make_tokenizer):
    """As GLM-5.1 does: it closes the thought of an earlier reply, and opens and closes that of the last one."""
    thought = (
        "{% if m.role == 'assistant' %}{{ '<think></think>' if loop.last else '</think>' }}{% endif %}{{ m.content"
    )
    tokenizer = load_tokenizer(str(make_tokenizer(NO_END.replace("{{ m.content", thought))))
    messages = turns("the sea", "is blue", "the sky", "is grey")

    expected = [["<think></think>is blue\n<|im_start|>"], ["<think></think>is grey\n<|im_start|>"]]
    assert runs(tokenizer, messages, turns="each", **NEXT) == expected


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


def test_calls_end_on_the_token_of_plain_replies_whatever_the_call_closes(bpe):
    """DeepSeek's template closes the call, the list of calls and the turn."""
    tokenizer = tokenizer_of("deepseek-r1", bpe)
    answer = ["It is high.<｜end▁of▁sentence｜>"]
    end = "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    call = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tide\n```json\n{"at": "noon"}' + end

    assert runs(tokenizer, KINDS["null"]) == [[call, *answer]]
    assert runs(tokenizer, KINDS["null"], turns="each") == [[call], answer]
    assert runs(tokenizer, KINDS["null"], turns="as-rendered") == [[call, *answer]]
    two = [user("the tide"), reply(None, tool_calls=called('{"at": "noon"}') * 2), RESULT, reply("It is high.")]
    ((text, _),) = runs(tokenizer, two)
    assert text.count("tide") == 2
    assert text.endswith(end)


QUOTES = (  # as Gemma 4's: control tokens around the texts of a call, and two after it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}"
    "call:{{ c.function.name }}{{ '{' }}{% for name, value in c.function.arguments | items %}{{ name }}:"
    "{% if value is string %}<|channel|>{{ value }}<|channel|>{% else %}{{ value }}"
    "{% endif %}{% endfor %}{{ '}' }}<|endoftext|>{% endfor %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_call_may_have_control_tokens_around_its_texts_and_none_around_numbers(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(QUOTES)))
    messages = [user("the tide"), reply("", tool_calls=called({"day": 5, "at": "noon"})), RESULT, reply("High.")]
    call = "call:tide{day:5at:<|channel|>noon<|channel|>}<|endoftext|><|im_end|>"

    for how in ("together", "each"):
        assert [text for texts in runs(tokenizer, messages, turns=how) for text in texts] == [call, "High.<|im_end|>"]


NAMED = (  # as gpt-oss's: calls have an end token of their kind, and the answer of a tool repeats its name
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}"
    "{{ messages[loop.index0 - 1].tool_calls[0].function.name }}<|channel|>{{ m.content }}<|im_end|>"
    "{% elif m.tool_calls %}assistant to={{ m.tool_calls[0].function.name }}<|channel|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|endoftext|>{% else %}{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize("result", ["high", ""])
def test_a_call_with_another_end_token_ends_before_the_answer_of_the_tool(make_tokenizer, result: str):
    tokenizer = load_tokenizer(str(make_tokenizer(NAMED)))
    asked = [user("the tide"), reply("", tool_calls=called({"at": "noon"}))]
    messages = [*asked, RESULT | {"content": result}, reply("High.")]
    call = ' to=tide<|channel|>{"at": "noon"}<|endoftext|>'

    with pytest.raises(
        RecordError, match=r"different control tokens, \['<\|endoftext\|>', '<\|im_end\|>'\]; give --turns e"
    ):
        runs(tokenizer, messages)
    assert runs(tokenizer, messages, turns="each") == [[call], ["\nHigh.<|im_end|>"]]
    assert runs(tokenizer, messages, untrained=[3]) == [[call]]


TWO_ENDS = (  # as Command R7B's: a token around the text, another one after the turn
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>{{ m.content }}"
    "<|channel|>{% else %}\n{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def test_a_reply_ends_with_its_turn(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(TWO_ENDS)))
    expected = [["<|channel|>is blue<|channel|><|im_end|>"], ["<|channel|>is grey<|channel|><|im_end|>"]]

    messages = turns("the sea", "is blue", "the sky", "is grey")
    assert runs(tokenizer, messages, turns="each") == expected
    assert reply_end_token(tokenizer) == tokenizer.eos_token_id


CLOSED_TAGS = (  # as Kimi K3's: closes the text by its name between control tokens, then the turn
    "{% for m in messages %}<|im_start|>{{ m.role }}<|channel|>{{ m.content }}<|endoftext|>text<|channel|><|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|channel|>{% endif %}"
)


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_a_reply_ends_with_all_that_closes_its_turn(make_tokenizer, eos: str | None):
    tokenizer = load_tokenizer(str(make_tokenizer(CLOSED_TAGS)))
    tokenizer.eos_token = eos
    expected = [["is blue<|endoftext|>text<|channel|><|im_end|>", "is grey<|endoftext|>text<|channel|><|im_end|>"]]

    assert runs(tokenizer, turns("the sea", "is blue", "the sky", "is grey")) == expected
    assert reply_end_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


ENDS_BEFORE_CALLS = (  # as Nemotron Nano 2's: what a turn says and what it calls are two turns
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% for c in m.tool_calls or [] %}"
    "<|im_start|>{{ m.role }}\n{{ c.function.name }}{{ c.function.arguments | tojson }}<|im_end|>\n{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_reply_that_goes_beyond_its_end_token_is_refused(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(ENDS_BEFORE_CALLS)))
    messages = [user("the tide"), reply("I look.", tool_calls=called({"at": "noon"})), RESULT, reply("High.")]

    for how in ("together", "each"):
        with pytest.raises(RecordError, match=r"writes <\|im_end\|>, which ends replies, inside of reply 1; use"):
            runs(tokenizer, messages, turns=how)


CALL_IDS = (  # as Kimi K2's: the name of the function is a part of the call's id
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.id }}<|channel|>{% for name, value in c.function.arguments | items %}{{ name }}="
    "{{ value.at if value is mapping else value }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_call_is_written_by_its_id_and_with_all_of_its_arguments(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(CALL_IDS)))

    def conversation(id: str, arguments: object) -> list:
        calls = [called(arguments)[0] | {"id": id}]
        return [user("the tide"), reply("", tool_calls=calls), RESULT | {"tool_call_id": id}, reply("High.")]

    expected = [["functions.tide:0<|channel|>at=noon<|im_end|>", "High.<|im_end|>"]]
    assert runs(tokenizer, conversation("functions.tide:0", {"at": "noon"})) == expected
    for id, arguments in (("call_1", {"at": "noon"}), ("functions.tide:0", {"when": {"at": "noon", "zone": "UTC"}})):
        with pytest.raises(RecordError, match="does not write the tool calls of message 2 whole"):
            runs(tokenizer, conversation(id, arguments))
