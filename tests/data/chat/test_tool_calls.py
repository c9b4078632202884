"""Tools, system turns and several turns through templates as real models have them: exact masks, or the reason.

The templates are short versions of our own, with each family's way of writing turns.
"""

import json
import re

import pytest

from megatron_sfr.data.chat.conversation import Conversation, encode
from megatron_sfr.data.chat.rendered_turns import persona_turn
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.families import called, reply, runs, user
from tests.data.records import CHATML, turns

TOOLS = [{"type": "function", "function": {"name": "tide", "description": "the tide", "parameters": {}}}]
LLAMA3 = (
    "{{ '<|endoftext|>' }}{% if tools %}<|start|>tools\n{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    '{{ \'<|start|>assistant\n{"name": "\' + f.name + \'", "parameters": \' }}{{ f.arguments | tojson }}'
    "{{ '}<|im_end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>ipython\n' }}{{ m.content | tojson }}<|im_end|>"
    "{% else %}{{ '<|start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # its control tokens are inside the calls, and nothing announces a reply
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + (ns.system if loop.index0 == 1 else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + ' [/RESULT]' }}"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '[CALL]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{% endif %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{% if c.function %}{% set c = c.function %}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.name + \'", "arguments": \' }}'
    "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_MARKED = QWEN3.replace("{% if loop.last %}{{ '<think>", "{% generation %}{% if loop.last %}{{ '<think>").replace(
    "</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}",
    "</tool_call>' }}{% endfor %}<|im_end|>{% endgeneration %}\n",
)
TEMPLATES = {"llama 3": LLAMA3, "mistral": MISTRAL, "qwen 3": QWEN3, "qwen 3, marked": QWEN3_MARKED}


def call(name: str, arguments: object, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def with_tools(*calls: dict, content: str | None = None) -> list[dict]:
    return [
        {"role": "user", "content": "the tide at noon"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        {"role": "tool", "content": 'high: 5 "m"'},
        {"role": "assistant", "content": "It is high."},
    ]


@pytest.fixture
def tokenizer_of(make_tokenizer):
    def make(template: str):
        tokenizer = load_tokenizer(str(make_tokenizer(template)))
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|channel|>", "<|start|>", "[CALL]", "[ARGS]"]}
        )
        return tokenizer

    return make


def supervised(tokenizer, messages: list[dict], tools: list | None = None) -> list[str]:
    """What is supervised, run by run; that ids and prompts are transformers' own is checked on the way."""
    result = encode(Conversation("f", 1, messages, None, tools), tokenizer)
    assert result.tokens.tolist() == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for (start, end), turn in zip(result.replies, replies, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], tools=tools, add_generation_prompt=True)["input_ids"]
        assert result.tokens[:start].tolist() == prompt
        assert result.loss_mask[start:end].all()
    assert result.loss_mask.sum() == sum(end - start for start, end in result.replies)
    return [tokenizer.decode(result.tokens[start:end]) for start, end in result.replies]


CALLED = {
    "llama 3": '{"name": "tide", "parameters": {"at": "noon"}}<|im_end|>',
    "mistral": '[CALL]tide[ARGS]{"at": "noon"}<|im_end|>',
    "qwen 3": '<tool_call>\n{"name": "tide", "arguments": {"at": "noon"}}\n</tool_call><|im_end|>',
}
CALLED["qwen 3, marked"] = CALLED["qwen 3"]
ANSWERED = dict.fromkeys(TEMPLATES, "It is high.<|im_end|>") | {"mistral": " It is high.<|im_end|>"}
ANSWERED |= dict.fromkeys(("qwen 3", "qwen 3, marked"), "<think>\n\n</think>\n\nIt is high.<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_supervised_completely_and_answers_of_tools_never(tokenizer_of, name: str):
    tools = None if name == "mistral" else TOOLS

    runs = supervised(tokenizer_of(TEMPLATES[name]), with_tools(call("tide", {"at": "noon"})), tools)

    assert runs == [CALLED[name], ANSWERED[name]]


@pytest.mark.parametrize("name", ["chatml", *TEMPLATES])
def test_system_turns_and_several_turns(tokenizer_of, name: str):
    tokenizer = tokenizer_of((TEMPLATES | {"chatml": CHATML})[name])

    runs = supervised(tokenizer, [persona_turn("calm"), *turns("the sea", "is blue", "the sky", "is grey")])

    assert [run.removeprefix("<think>\n\n</think>\n\n").strip() for run in runs] == [
        "is blue<|im_end|>",
        "is grey<|im_end|>",
    ]


def test_two_calls_one_without_arguments_end_behind_the_second(tokenizer_of):
    messages = with_tools(call("tide", {"at": "noon"}, id="a"), call("wind", {}, id="b"))

    runs = supervised(tokenizer_of(MISTRAL), messages)

    assert runs[0] == '[CALL]tide[ARGS]{"at": "noon"}[CALL]wind[ARGS]{}<|im_end|>'


def test_a_last_turn_may_call_and_say_something_too(tokenizer_of):
    messages = with_tools(call("tide", json.dumps({"at": "noon"})), content="I look.")[:2]

    (run,) = supervised(tokenizer_of(QWEN3), messages, TOOLS)

    assert run == "<think>\n\n</think>\n\nI look." + CALLED["qwen 3"]


def test_tool_turns_alone_need_no_calls(tokenizer_of):
    messages = [*turns("the tide", "I look."), {"role": "tool", "content": "5"}, turns("", "It is 5.")[1]]

    assert supervised(tokenizer_of(CHATML), messages) == ["I look.<|im_end|>", "It is 5.<|im_end|>"]


NO_TOOLS = "{% for m in messages if m.role != 'tool' %}" + CHATML.split("%}", 1)[1]
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]
LAST_SYSTEM = MISTRAL.replace("if loop.index0 == 1", "if loop.last or messages[loop.index0 + 1:] | length == 1")
NOON = call("tide", {"at": "noon"})
REFUSED = {
    "calls dropped": (CHATML, with_tools(NOON, content=""), None, "does not write the tool calls of message 2 whole"),
    "arguments dropped": (
        MISTRAL.replace(" + c.function.arguments | tojson", ""),
        with_tools(NOON),
        None,
        "does not write the tool calls of message 2 whole",
    ),
    "tool turn dropped": (
        NO_TOOLS,
        with_tools(NOON, content="")[2:],
        None,
        "not write the tool turn of message 3",
    ),
    "tools dropped": (CHATML, turns("hi", "yes"), TOOLS, "does not write the record's tools"),
    "names of tools dropped": (
        "{% for t in tools or [] %}{{ t.name }}: {{ t.description }};{% endfor %}" + CHATML,
        turns("the tide", "yes"),
        TOOLS,
        "does not write the tool 'tide'; write tools as the function alone",
    ),
    "system dropped": (NO_SYSTEM, [persona_turn("calm"), *turns("hi", "yes")], None, "does not write the system turn"),
    "quoted twice": (LLAMA3, with_tools(call("tide", '"at 1"')), None, "quotes the arguments of reply 1 once more"),
    "two calls": (LLAMA3, with_tools(NOON, NOON), None, "refuses the conversation (one call a turn)"),
    "no end": (
        MISTRAL.replace("{% endfor %}{{ eos_token }}", "{% endfor %}"),
        with_tools(NOON),
        None,
        "writes no control token after the tool calls of message 2; add eos_token",
    ),
    "control token": (MISTRAL, with_tools(call("tide", {"at": "[ARGS]"})), None, "message 2 has the control token"),
    "control token in tools": (
        QWEN3,
        turns("hi", "yes"),
        [{"name": "<|im_end|>"}],
        "the list of tools has",
    ),
    "system moves": (
        LAST_SYSTEM,
        [persona_turn("calm"), *turns("hi", "yes", "hi", "no")],
        None,
        "the prompt of reply 1 at inference is not a prefix of the conversation as the chat template writes it; give "
        "--turns each (one sample for each reply, after its own prompt)",
    ),
}


@pytest.mark.parametrize(("template", "messages", "tools", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_exact_is_refused_with_its_remedy(tokenizer_of, template, messages, tools, reason):
    if messages[0]["role"] == "tool":
        messages = [*turns("hi", "yes"), *messages]

    with pytest.raises(RecordError, match=re.escape(reason)) as caught:
        encode(Conversation("f", 1, messages, None, tools), tokenizer_of(template))
    assert ";" in str(caught.value) or "change its turns" in str(caught.value)


STRINGS = (  # arguments are joined to text, and content that is not null is written before the calls, as in DeepSeek's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% if m['content'] == none %}"
    "{{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}{% else %}"
    "{{ m['content'] + '!' }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUOTED = STRINGS.replace(
    "' ' + m.tool_calls[0].function.arguments", "' ' + m.tool_calls[0].function.arguments | tojson"
)
NONE = STRINGS.replace("m['content'] == none", "true").replace("{{ m.tool_calls", "{{ m.content }}{{ m.tool_calls")


@pytest.mark.parametrize("arguments", [{"at": "noon"}, '{"at": "noon"}'], ids=["object", "string"])
@pytest.mark.parametrize("content", [None, ""], ids=["null", "empty"])
@pytest.mark.parametrize("template", [STRINGS, QUOTED, NONE], ids=["joined", "as JSON", "null is written"])
def test_calls_are_converted_to_the_form_that_the_template_reads(make_tokenizer, template: str, content, arguments):
    tokenizer = load_tokenizer(str(make_tokenizer(template)))
    messages = [user("the tide"), reply(content, tool_calls=called(arguments)), {"role": "tool", "content": "high"}]

    assert runs(tokenizer, [*messages, reply("yes")]) == [['tide {"at": "noon"}<|im_end|>', "yes<|im_end|>"]]


def test_calls_of_both_forms_are_converted_to_one(make_tokenizer):
    tokenizer = load_tokenizer(str(make_tokenizer(QUOTED)))
    both = [user("the tide"), reply(None, tool_calls=called('{"at": "noon"}')), {"role": "tool", "content": "high"}]
    both += [reply(None, tool_calls=called({"at": "six"})), {"role": "tool", "content": "low"}, reply("yes")]

    expected = [['tide {"at": "noon"}<|im_end|>', 'tide {"at": "six"}<|im_end|>', "yes<|im_end|>"]]
    assert runs(tokenizer, both) == expected


@pytest.mark.parametrize("arguments", [{}, "{}", " ", ""])
def test_a_call_without_arguments_is_not_quoted(make_tokenizer, arguments):
    tokenizer = load_tokenizer(str(make_tokenizer(QUOTED)))
    messages = [user("the tide"), reply(None, tool_calls=called(arguments)), {"role": "tool", "content": "high"}]

    assert runs(tokenizer, [*messages, reply("yes")]) == [["tide {}<|im_end|>", "yes<|im_end|>"]]
