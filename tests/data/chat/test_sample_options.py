"""Options of a conversation's samples: which replies, where the persona stands, template variables.

Each remedy that a refusal names is followed, and has to work.
"""

import re

import pytest

from megatron_sfr.data.chat.conversation import Conversation, encode_samples
from megatron_sfr.data.chat.loss_mask import prompt_ids
from megatron_sfr.data.chat.rendered_turns import persona_turn
from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions, parse_template_kwargs
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import ANSWER, KINDS, PLAIN, TOOLS, reply, runs, tokenizer_of, user
from tests.data.records import CHATML, turns


@pytest.fixture(scope="module")
def chatml(make_tokenizer):
    return load_tokenizer(str(make_tokenizer(CHATML)))


def test_replies_that_are_not_trained_are_context(chatml):
    messages = turns("the sea", "is blue", "the sky", "is grey", "sure", "yes")
    first, second, third = "is blue<|im_end|>", "is grey<|im_end|>", "yes<|im_end|>"

    assert runs(chatml, messages, untrained=[1]) == [[second, third]]
    assert runs(chatml, messages, train_on="last") == [[third]]
    assert runs(chatml, messages, turns="last") == [[third]]
    assert runs(chatml, messages, turns="each") == [[first], [second], [third]]
    assert runs(chatml, messages, turns="each", untrained=[3]) == [[first], [third]]
    assert runs(chatml, messages, turns="each", train_on="last") == [[third]]
    with pytest.raises(RecordError, match=r"none of the replies is trained; leave out"):
        runs(chatml, messages, train_on="last", untrained=[5])


def test_a_reply_that_is_only_context_may_lose_its_thought(bpe):
    tokenizer = tokenizer_of("qwen3", bpe)

    assert len(runs(tokenizer, KINDS["thoughts"], untrained=[1])[0]) == 1
    assert len(runs(tokenizer, KINDS["thoughts"], train_on="last")[0]) == 1


@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-large-2407", "mistral-nemo"])
def test_a_persona_in_the_user_turn_where_the_template_has_no_system_turn(bpe, name: str):
    tokenizer = tokenizer_of(name, bpe)
    messages = [persona_turn("poet"), *PLAIN]

    with pytest.raises(RecordError, match=r"the persona \(it became the system turn\).*--persona-as user"):
        runs(tokenizer, messages, persona="poet")
    by_hand = [user("Answer in this persona: poet.\n\nthe sea"), *PLAIN[1:]]
    conversation = Conversation("f", 1, messages, "poet")
    (sample,) = encode_samples(conversation, tokenizer, SampleOptions(persona_as="user"))

    assert sample.tokens.tolist() == tokenizer.apply_chat_template(by_hand)["input_ids"]
    prompt = tokenizer.apply_chat_template(by_hand[:1], add_generation_prompt=True)["input_ids"]
    assert prompt_ids(messages[:2], tokenizer, TemplateOptions(persona_as="user")) == prompt


def test_a_system_text_that_also_stands_in_a_user_turn_is_looked_for_in_its_own_place(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer("{% for m in messages if m.role != 'system' %}" + CHATML[26:])))

    with pytest.raises(RecordError, match=r"does not write the system turn; give --persona-as user"):
        runs(tokenizer, [{"role": "system", "content": "Hi"}, *turns("Hi there", "yes")])


def test_template_variables_decide_the_prompt_and_unknown_ones_are_refused(bpe):
    tokenizer = tokenizer_of("qwen3", bpe)
    off = {"template_kwargs": {"enable_thinking": False}}

    assert runs(tokenizer, PLAIN, turns="each", **off) == [
        [PLAIN[1]["content"] + "<|im_end|>"],
        ["It is grey.<|im_end|>"],
    ]
    expected = tokenizer.apply_chat_template(PLAIN[:1], add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert prompt_ids(PLAIN[:1], tokenizer, TemplateOptions(**off)) == expected
    with pytest.raises(ValueError, match=r"does not read 'enable_thinkin'; use .*enable_thinking"):
        runs(tokenizer, PLAIN, template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="--template-kwargs is not a JSON object"):
        parse_template_kwargs("[1]")
    with pytest.raises(ValueError, match="messages is set for each conversation; leave it out"):
        TemplateOptions(template_kwargs={"messages": []})


def test_a_template_that_writes_the_date_gets_a_fixed_one(make_tokenizer):
    dated = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}" + CHATML
    tokenizer = load_tokenizer(str(make_tokenizer(dated)))

    def first_text(**options) -> str:
        ids = prompt_ids(turns("hi"), tokenizer, TemplateOptions(**options))
        return tokenizer.decode(ids).partition("<|im_start|>")[0]

    assert first_text() == "26 Jul 2024"
    assert first_text(template_date="2025-01-31") == "31 Jan 2025"
    assert first_text(template_kwargs={"day": "Monday"}) == "Monday"
    assert not tokenizer.apply_chat_template(turns("hi"), tokenize=False).startswith("26 Jul 2024"), "transformers' own"
    with pytest.raises(ValueError, match="template_date is 'today'; write a day as YYYY-MM-DD"):
        TemplateOptions(template_date="today")


HARMONY = (  # channels and two end tokens, as gpt-oss has them
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|channel|>analysis\n{{ m.thinking }}<|im_end|><|im_start|>assistant{% endif %}"
    "<|channel|>final\n{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}"
    "{% else %}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def test_a_last_reply_may_hold_control_tokens_of_the_template(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(HARMONY)))
    messages = [user("the sea"), reply("blue", thinking="the sky"), user("yes"), reply("grey", thinking="no")]

    with pytest.raises(RecordError, match=r"leaves out the thinking of reply 1; give --turns each"):
        runs(tokenizer, messages)
    with pytest.raises(RecordError, match=r"writes a control token at the start of reply 1; give --turns each"):
        runs(tokenizer, turns("the sea", "blue", "yes", "grey"))
    assert runs(tokenizer, messages, turns="each") == [
        ["<|channel|>analysis\nthe sky<|im_end|><|im_start|>assistant<|channel|>final\nblue<|endoftext|>"],
        ["<|channel|>analysis\nno<|im_end|><|im_start|>assistant<|channel|>final\ngrey<|endoftext|>"],
    ]


def test_a_reply_that_the_tokenizer_would_join_to_the_prompt_is_encoded_separately(chatml):
    messages = turns("hi", "\n\nyes")

    with pytest.raises(
        RecordError, match=r"joins '\\n' before reply 1 with '\\n' at its start in one token; give --turns each"
    ):
        runs(chatml, messages)
    assert runs(chatml, messages, turns="each") == [["\n\nyes<|im_end|>"]]


def test_a_thought_that_the_prompt_opens_is_written_once(bpe):
    tokenizer = tokenizer_of("deepseek-v3-thinking", bpe)

    (run,) = runs(tokenizer, KINDS["thought"], turns="each")
    assert run[0].startswith("First I look at it.\n</think>")
    with pytest.raises(RecordError, match=r"begin the reply with <think>...</think>, which may be empty"):
        runs(tokenizer, PLAIN[:2], turns="each")
    (run,) = runs(tokenizer, [PLAIN[0], reply("<think>\n</think>\n\nblue")], turns="each")
    assert run == ["</think>\n\nblue<｜end▁of▁sentence｜>"]
    with pytest.raises(RecordError, match=r"write reasoning_content at the start of the content as <think>...</think>"):
        runs(tokenizer, KINDS["reasoning"], turns="each")


def test_a_thought_after_a_prompt_that_closes_it_is_refused(bpe):
    off = {"template_kwargs": {"enable_thinking": False}}
    for kind in ("thought", "reasoning"):
        with pytest.raises(
            RecordError, match=r"closes the thought before reply 1, which has another one; leave it out"
        ):
            runs(tokenizer_of("qwen3", bpe), KINDS[kind], turns="each", **off)
    assert runs(tokenizer_of("qwen3", bpe), PLAIN[:2], turns="each", **off) == [[ANSWER + "<|im_end|>"]]


OPENED = (  # as Nemotron Nano 2's: a finished reply begins after the opening of a thought, whatever it has
    "{% set off = messages[0].content == '/no_think' %}{% for m in messages if m.content != '/no_think' %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' if off else '<think>\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think></think>' if off else '<think>\n' }}{% endif %}"
)


def test_a_thought_is_neither_opened_twice_nor_left_open(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(OPENED)))
    thought = [user("the sea"), reply("<think>\nHm.</think>It is.")]

    with pytest.raises(RecordError, match=r"opens the thought of reply 1 twice; give --turns each"):
        runs(tokenizer, thought)
    assert runs(tokenizer, thought, turns="each") == [["Hm.</think>It is.<|im_end|>"]]
    for how in ("together", "each"):
        with pytest.raises(RecordError, match=r"opens a thought and reply 1 has none; begin the reply with <think>"):
            runs(tokenizer, PLAIN[:2], turns=how)
    switched_off = [{"role": "system", "content": "/no_think"}, *PLAIN[:2]]
    assert runs(tokenizer, switched_off) == [[ANSWER + "<|im_end|>"]]


EMPTY = (  # as Kimi K2 Thinking's: an empty thought before every reply
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_thought_has_no_empty_one_before_it(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(EMPTY)))
    thought = "<think>\nHm.\n</think>\n\nIt is."

    with pytest.raises(RecordError, match=r"writes an empty thought before that of reply 1; give --turns each"):
        runs(tokenizer, [user("the sea"), reply(thought)])
    assert runs(tokenizer, [user("the sea"), reply(thought)], turns="each") == [[thought + "<|im_end|>"]]
    assert runs(tokenizer, [user("the sea"), reply("It is.")]) == [["<think></think>It is.<|im_end|>"]]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "smollm3-unsloth", "phi-4-reasoning"])
def test_a_reply_that_is_a_thought_alone_is_complete(bpe, family: str):
    """Reasoning that a limit of tokens has cut, or that a user trains without an answer."""
    thought = "<think>\nFirst I look at it.\n</think>"
    ((text,),) = runs(tokenizer_of(family, bpe), [user("the sea"), reply(thought)])
    assert text.startswith(thought)
    assert text.removeprefix(thought).strip() == "<|im_end|>"


def test_a_thought_alone_that_the_template_drops_is_refused_and_kept_by_a_sample_for_each_reply(bpe):
    for thought in ("<think>\nFirst I look at it.\n</think>", "<think>\n\n</think>"):
        messages = [user("the sea"), reply(thought)]
        with pytest.raises(RecordError, match="control token at the start of reply 1; give --turns each"):
            runs(tokenizer_of("deepseek-r1", bpe), messages)
        ((text,),) = runs(tokenizer_of("deepseek-r1", bpe), messages, turns="each")
        assert text.startswith(thought)


def test_a_reply_that_mentions_a_tag_is_not_cut_there(bpe):
    tokenizer = tokenizer_of("deepseek-r1", bpe)
    messages = [user("the sea"), reply("Write </think> to end a thought.")]

    with pytest.raises(
        RecordError, match=r"leaves out the beginning of reply 1 \('Write </think> to .*; give --turns each"
    ):
        runs(tokenizer, messages)
    assert runs(tokenizer, messages, turns="each") == [["Write </think> to end a thought.<｜end▁of▁sentence｜>"]]


def test_a_list_of_templates_has_one_for_tools(chatml, make_tokenizer):
    tools = "{{ tools | tojson }}" + CHATML
    tokenizer = load_tokenizer(str(make_tokenizer({"default": CHATML, "tool_use": tools})))

    assert (
        runs(tokenizer, turns("hi", "yes")) == runs(tokenizer, turns("hi", "yes"), tools=TOOLS) == [["yes<|im_end|>"]]
    )
    (sample,) = encode_samples(Conversation("f", 1, turns("hi", "yes"), None, TOOLS), tokenizer)
    assert "the tide" in tokenizer.decode(sample.tokens)
    blind = load_tokenizer(str(make_tokenizer({"default": CHATML, "tool_use": CHATML + " "})))
    with pytest.raises(RecordError, match="does not write the record's tools"):
        runs(blind, turns("hi", "yes"), tools=TOOLS)


REMEDIES = {  # a refusal, and what the user does
    "field to content": (
        "phi-3",
        KINDS["reasoning"],
        {},
        "write reasoning_content at the start of the content as <think>...</think>",
        (KINDS["thought"], {}),
    ),
    "field left out": ("phi-3", KINDS["reasoning"], {}, "or leave it out", (KINDS["one"], {})),
    "control token removed": ("phi-3", [user("<|end|>"), reply("x")], {}, "remove it", ([user("end"), reply("x")], {})),
    "thinking off": (
        "qwen3-thinking-2507",
        KINDS["several"],
        {},
        "give --turns each",
        (KINDS["several"], {"turns": "each"}),
    ),
    "system moved": (
        "mistral-v0.1",
        KINDS["system"],
        {},
        "give --persona-as user",
        (KINDS["system"], {"persona_as": "user"}),
    ),
    "system by each": (
        "mistral-nemo",
        KINDS["system"],
        {},
        "or --persona-as user",
        (KINDS["system"], {"persona_as": "user"}),
    ),
    "thought": (
        "deepseek-v3-thinking",
        KINDS["one"],
        {},
        "begin the reply with <think>",
        (KINDS["thought"], {"turns": "each"}),
    ),
}


@pytest.mark.parametrize(("family", "messages", "options", "remedy", "then"), REMEDIES.values(), ids=REMEDIES)
def test_a_remedy_works(bpe, family, messages, options, remedy, then):
    tokenizer = tokenizer_of(family, bpe)

    with pytest.raises(RecordError, match=re.escape(remedy)):
        runs(tokenizer, messages, **options)
    assert runs(tokenizer, then[0], **then[1])
