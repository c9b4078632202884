"""Calls of tools in the forms of trainers, datasets and APIs: the sample is that of the messages of OpenAI's API."""

import json
import re

import pytest

from megatron_sfr.data.chat.conversation import Conversation, encode_samples, parse_record
from megatron_sfr.data.chat.formats import FORMATS, format_of
from megatron_sfr.data.chat.template_options import SampleOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.storage.jsonl import Record, RecordError
from tests.data.chat.test_tool_calls import QWEN3

EACH = SampleOptions(turns="each")
THINKING = QWEN3.replace("{{ m.content or '' }}", "{{ m.reasoning_content or '' }}{{ m.content or '' }}")
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "the tide", "parameters": PARAMETERS}}]
BARE = [TOOLS[0]["function"]]
NOON, NIGHT = {"name": "tide", "arguments": {"at": "noon"}}, {"name": "tide", "arguments": {"at": "night"}}
CALLS = [{"type": "function", "function": call} for call in (NOON, NIGHT)]
ASKED, LOOK = "the tide at noon and at night", "is the sky grey"
SYSTEM = {"role": "system", "content": "Be kind."}
MESSAGES = [
    SYSTEM,
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": LOOK, "tool_calls": CALLS},
    {"role": "tool", "content": "high"},
    {"role": "tool", "content": "low"},
    {"role": "assistant", "content": "is blue", "train": False},
    {"role": "user", "content": "and the sea"},
    {"role": "assistant", "content": "", "tool_calls": CALLS[:1]},
    {"role": "tool", "content": "high"},
    {"role": "assistant", "content": "is grey"},
]


def blocks(*calls: dict) -> list[dict]:
    return [
        {"type": "tool_use", "id": call["name"], "name": call["name"], "input": call["arguments"]} for call in calls
    ]


def result(content: object, **more: object) -> dict:
    return {"type": "tool_result", "tool_use_id": "tide", "content": content, **more}


TEXT = {"type": "text", "text": LOOK, "cache_control": {"type": "ephemeral"}}
RECORDS = {
    "ms-swift": {
        "tools": json.dumps(TOOLS),
        "messages": [
            *MESSAGES[:2],
            {"role": "assistant", "content": LOOK},
            {"role": "tool_call", "content": json.dumps(NOON)},
            {"role": "tool_call", "content": json.dumps(NIGHT)},
            {"role": "tool_response", "content": "high"},
            {"role": "tool_response", "content": "low"},
            {"role": "assistant", "content": "is blue", "loss": False},
            MESSAGES[6],
            {"role": "tool_call", "content": NOON},
            {"role": "tool", "content": "high"},
            MESSAGES[9],
        ],
    },
    "Anthropic": {
        "model": "claude",
        "system": [{"type": "text", "text": "Be kind."}],
        "tools": [{"name": "tide", "description": "the tide", "input_schema": PARAMETERS}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": ASKED}]},
            {"role": "assistant", "content": [TEXT, *blocks(NOON, NIGHT)]},
            {"role": "user", "content": [result("high", is_error=False), result([{"type": "text", "text": "low"}])]},
            {"role": "assistant", "content": [{"type": "text", "text": "is blue"}], "train": False},
            {"role": "user", "content": "and the sea"},
            {"role": "assistant", "content": blocks(NOON)},
            {"role": "user", "content": [result("high")]},
            {"role": "assistant", "content": "is grey"},
        ],
    },
    "ShareGPT": {
        "system": "Be kind.",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": ASKED},
            {"from": "gpt", "value": LOOK},
            {"from": "function_call", "value": json.dumps([NOON, NIGHT])},
            {"from": "observation", "value": "high"},
            {"from": "tool_response", "value": "low"},
            {"from": "gpt", "value": "is blue", "weight": 0},
            {"from": "human", "value": "and the sea"},
            {"from": "tool_call", "value": json.dumps(NOON)},
            {"from": "observation", "value": "high"},
            {"from": "gpt", "value": "is grey"},
        ],
    },
}


def parsed(fields: dict) -> Conversation:
    form = format_of(fields)
    assert form in FORMATS
    return parse_record(Record("f", 1, json.dumps(fields).encode()), form)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return load_tokenizer(str(make_tokenizer(THINKING)))


def samples(fields: dict, tokenizer) -> list[tuple[list[int], list[int], tuple]]:
    found = encode_samples(parsed(fields), tokenizer, EACH)
    return [(sample.tokens.tolist(), sample.loss_mask.tolist(), sample.replies) for sample in found]


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS)
def test_calls_in_any_form_make_the_same_samples(fields: dict, tokenizer):
    expected = samples({"messages": MESSAGES, "tools": TOOLS}, tokenizer)

    assert len(expected) == 3  # one reply is not trained
    assert samples(fields, tokenizer) == expected


def test_queries_and_answers_of_xlam_are_calls(tokenizer):
    fields = {"id": 0, "query": ASKED, "answers": json.dumps([NOON, NIGHT]), "tools": json.dumps(BARE)}
    messages = [MESSAGES[1], {"role": "assistant", "content": "", "tool_calls": CALLS}]

    assert samples(fields, tokenizer) == samples({"messages": messages, "tools": TOOLS}, tokenizer)
    assert format_of({"query": "a", "answers": ["b"], "passages": []}) is None  # MS MARCO


TEXTS = [("user", ASKED), ("assistant", LOOK), ("user", "and the sea"), ("assistant", "is grey")]
PLAIN = [SYSTEM, *({"role": role, "content": text} for role, text in TEXTS)]


@pytest.mark.parametrize(
    "fields",
    [
        {  # Gemini
            "systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]},
            "contents": [
                {"role": role.replace("assistant", "model"), "parts": [{"text": text[:5]}, {"text": text[5:]}]}
                for role, text in TEXTS
            ],
            "generationConfig": {"temperature": 1},
        },
        {  # Bedrock
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be kind."}],
            "messages": [{"role": role, "content": [{"text": text}]} for role, text in TEXTS],
        },
        {"id": "0", "system": "Be kind.", "data": [text for _, text in TEXTS]},  # UltraChat
    ],
)
def test_texts_of_other_apis_make_the_same_samples(fields: dict, tokenizer):
    assert samples(fields, tokenizer) == samples({"messages": PLAIN}, tokenizer)


@pytest.mark.parametrize("mark", [{"train": False}, {"loss": 0}, {"weight": 0}])
def test_a_reply_of_gemini_may_be_context(mark: dict):
    roles = [("user", {}), ("model", mark), ("user", {}), ("model", {"train": True})]
    contents = [{"role": role, "parts": [{"text": "the sea"}], **more} for role, more in roles]
    assert parsed({"contents": contents}).untrained == {1}


def test_tools_that_the_system_turn_has_are_not_written_again(tokenizer):
    """Hermes's records have them in both places."""
    turns = [{"role": "system", "content": f"Use <tools> {BARE} </tools>"}, MESSAGES[1], MESSAGES[9]]
    assert samples({"messages": turns, "tools": json.dumps(TOOLS)}, tokenizer) == samples(
        {"messages": turns}, tokenizer
    )
    longer = str(BARE).replace("tide", "tide_table")
    for system in ("Use <tools>", f"Use {BARE}", f"Use <tools> {longer} </tools>"):
        given = [{"role": "system", "content": system}, *turns[1:]]
        assert parsed({"messages": given, "tools": TOOLS}).tools == TOOLS


def test_a_thought_of_anthropic_is_reasoning(tokenizer):
    thought = {"type": "thinking", "thinking": "is it high", "signature": "x"}
    asked = {"role": "user", "content": ASKED}
    calls = {"tool_calls": CALLS[:1]}
    for content, beside, reply in (
        ([thought, TEXT], {}, {"content": LOOK}),
        ([thought, *blocks(NOON)], {}, {"content": "", **calls}),
        ([thought, TEXT], calls, {"content": LOOK, **calls}),  # Mistral's
    ):
        given = {"messages": [asked, {"role": "assistant", "content": content, **beside}], "tools": TOOLS}
        expected = {"role": "assistant", "reasoning_content": "is it high", **reply}
        assert samples(given, tokenizer) == samples({"messages": [asked, expected], "tools": TOOLS}, tokenizer)


def test_a_result_may_be_followed_by_the_user():
    content = [result("high"), {"type": "text", "text": "and the sea"}]
    given = [*MESSAGES[1:3], {"role": "user", "content": content}, MESSAGES[9]]
    assert parsed({"messages": given}).messages[2:4] == [
        {"role": "tool", "content": "high", "tool_call_id": "tide"},
        {"role": "user", "content": "and the sea"},
    ]


def reply(*parts: dict, **more: object) -> list[dict]:
    return [MESSAGES[1], {"role": "assistant", "content": list(parts), **more}]


THOUGHT = {"type": "thinking", "thinking": "Hm."}
REFUSED = {
    "text after a call": (
        reply(*blocks(NOON), TEXT),
        "message 2 has its parts in another order than one thought, text",
    ),
    "two thoughts": (reply(THOUGHT, THOUGHT, TEXT), "message 2 has its parts in another order than one thought, text"),
    "thought twice": (reply(THOUGHT, TEXT, reasoning_content="Hm."), "message 2 has reasoning_content beside its"),
    "hidden thought": (reply({"type": "redacted_thinking", "data": "x"}, *blocks(NOON)), "of type 'redacted_thinking'"),
    "no name": (reply({"type": "tool_use", "input": {}}), "message 2 has a tool call without the name of a function"),
    "no input": (reply({"type": "tool_use", "name": "tide"}), "message 2 has a tool call without arguments"),
    "error": ([{"role": "user", "content": [result("x", is_error=True)]}], "a tool_result with is_error, which"),
    "picture": ([{"role": "user", "content": [result([{"type": "image"}])]}], "message 1 has content of type 'image'"),
    "late result": ([{"role": "user", "content": [TEXT, result("x")]}], "a tool_result after other content; put the"),
    "no JSON": ([MESSAGES[1], {"role": "tool_call", "content": "tide()"}], "the call of turn 2 is not JSON; write"),
    "half trained": (
        [MESSAGES[1], {"role": "assistant", "content": LOOK, "loss": False}, {"role": "tool_call", "content": NOON}],
        "turn 3 is part of the reply before it, and one of them is not trained; mark both",
    ),
    "two reasonings": (
        [
            MESSAGES[1],
            {"role": "assistant", "content": LOOK, "reasoning_content": "a"},
            {"role": "tool_call", "content": NOON, "reasoning_content": "b"},
        ],
        "turn 3 is part of the reply before it, which has reasoning_content too; write it once",
    ),
}


@pytest.mark.parametrize(("messages", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_equal_message_is_refused(messages: list[dict], reason: str):
    with pytest.raises(RecordError, match=re.escape(reason)):
        parsed({"messages": messages})
