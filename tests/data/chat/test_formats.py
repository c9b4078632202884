"""Formats of records: all become the same turns, the first record decides, and a mixture is an error."""

import json
import re
from pathlib import Path

import pytest

from megatron_sfr.data.chat.conversation import parse_record
from megatron_sfr.data.chat.formats import FORMATS, detect
from megatron_sfr.storage.jsonl import Record, RecordError
from tests.data.records import turns, write_records

CALL = [{"type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}]
TURNS = turns("the sea", "is blue", "and the sky", "is grey")
SYSTEM = {"role": "system", "content": "Be kind."}
SAME = {
    "messages": {"messages": [SYSTEM, *TURNS]},
    "sharegpt": {
        "system": "Be kind.",
        "conversations": [
            {"from": who, "value": turn["content"]}
            for who, turn in zip(("human", "gpt", "user", "bot"), TURNS, strict=True)
        ],
    },
    "alpaca": {
        "instruction": "and the sky",
        "input": "",
        "output": "is grey",
        "system": "Be kind.",
        "history": [["the sea", "is blue"]],
    },
    "completion": {"system": "Be kind.", "prompt": TURNS[:-1], "completion": "is grey"},
}


def parse(fields: dict, form: str, persona_key: str = "persona"):
    return parse_record(Record("f", 1, json.dumps(fields).encode()), form, persona_key)


@pytest.mark.parametrize("form", FORMATS)
def test_all_formats_have_the_same_numbers(tmp_path: Path, form: str):
    path = write_records(tmp_path / "records.jsonl", [[], {"id": 1}, SAME[form] | {"style": "calm"}])

    assert detect(path) == form
    assert parse(SAME[form], form).messages == [SYSTEM, *TURNS]
    assert parse(SAME[form] | {"style": "calm", "persona": "wild"}, form, "style").persona == "calm"


def test_an_input_follows_its_instruction():
    record = {"instruction": "Translate.", "input": "the sea", "output": "la mer", "system": "", "persona": "calm"}

    (system, asked, reply) = parse(record, "alpaca").messages

    assert system["content"] == "Answer in this persona: calm."
    assert (asked["content"], reply["content"]) == ("Translate.\nthe sea", "la mer")


def test_sharegpt_tools_are_those_of_messages():
    tools = [{"type": "function", "function": {"name": "tide", "description": "the tide", "parameters": {}}}]
    values = [
        ("human", "the tide"),
        ("function_call", json.dumps(CALL[0]["function"])),
        ("observation", "high"),
        ("gpt", "It is high."),
    ]
    sharegpt = {"conversations": [{"from": who, "value": value} for who, value in values], "tools": json.dumps(tools)}
    messages = [
        {"role": "user", "content": "the tide"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "high"},
        {"role": "assistant", "content": "It is high."},
    ]

    for record, form in ((sharegpt, "sharegpt"), ({"messages": messages, "tools": tools}, "messages")):
        conversation = parse(record, form)
        assert conversation.messages == messages
        assert conversation.tools == tools


def test_plain_text_is_sent_elsewhere(tmp_path: Path):
    path = write_records(tmp_path / "corpus.jsonl", [{"id": 1, "text": "The sea is blue.", "data": ["The sea."]}])

    with pytest.raises(ValueError, match=r"corpus\.jsonl holds plain text, .*; use megatron-sfr prepare-text"):
        detect(path)


def sharegpt(*turns: dict) -> dict:
    return {"conversations": list(turns)}


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


def test_the_system_field_is_a_system_turn_in_every_format():
    assert parse({"system": "Be kind.", "messages": TURNS}, "messages").messages == [SYSTEM, *TURNS]
    assert parse({"system": "Be kind.", "messages": [SYSTEM, *TURNS]}, "messages").messages == [SYSTEM, *TURNS]
    assert parse({"system": " ", "messages": [SYSTEM, *TURNS]}, "messages").messages == [SYSTEM, *TURNS]
    for nothing in ("", " ", None):
        empty = [SYSTEM | {"content": nothing}, *TURNS]
        assert parse({"messages": empty}, "messages").messages == TURNS
        assert parse({"system": "Be kind.", "messages": empty}, "messages").messages == [SYSTEM, *TURNS]


def test_functions_are_tools_of_an_older_name():
    tide = {"name": "tide", "description": "the tide", "parameters": {}}
    old = [
        {"role": "user", "content": "the tide"},
        {"role": "assistant", "content": None, "function_call": CALL[0]["function"]},
        {"role": "function", "name": "tide", "content": "high"},
        {"role": "assistant", "content": "It is high."},
    ]

    conversation = parse({"messages": old, "functions": [tide]}, "messages")

    assert conversation.tools == [{"type": "function", "function": tide}]
    assert conversation.messages == [
        old[0],
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "name": "tide", "content": "high"},
        old[3],
    ]
    for tools in (json.dumps([tide]), [json.dumps(tide)]):
        assert parse(SAME["alpaca"] | {"tools": tools}, "alpaca").tools == [tide]


def test_a_prompt_is_context_and_its_replies_are_not_trained():
    assert parse(SAME["completion"], "completion").untrained == {2}
    asked = [TURNS[0], TURNS[1] | {"weight": 1}, TURNS[2]]
    assert parse({"prompt": asked, "completion": "is grey"}, "completion").untrained == set()


def test_turns_of_nemo_and_of_api_dumps():
    """Roles in capitals, and fields that are there but empty."""
    nemo = [
        {"from": "User", "value": "the sea", "label": None},
        {"from": "Assistant", "value": "is blue", "canonical_form": ""},
    ]
    dump = [TURNS[0], TURNS[1] | {"refusal": None, "annotations": [], "audio": {}, "name": ""}]

    assert parse({"mask": "User", "system": "", "conversations": nemo}, "sharegpt").messages == TURNS[:2]
    assert parse({"messages": dump}, "messages").messages == TURNS[:2]
    parts = [TURNS[0] | {"content": [{"type": "input_text", "text": "the sea"}]}, TURNS[1]]
    assert parse({"messages": parts}, "messages").messages == TURNS[:2]


@pytest.mark.parametrize("mark", [{"train": False}, {"train": 0}, {"loss": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_reply_is_not_trained_whichever_name_the_mark_has(mark: dict):
    messages = [TURNS[0], TURNS[1] | mark, *TURNS[2:]]
    sharegpt = [
        {"from": turn["role"], "value": turn["content"]} | (mark if i == 1 else {}) for i, turn in enumerate(TURNS)
    ]

    for conversation in (parse({"messages": messages}, "messages"), parse({"conversations": sharegpt}, "sharegpt")):
        assert conversation.untrained == {1}
        assert conversation.messages == TURNS


def test_a_turn_of_sharegpt_may_have_reasoning():
    fields = {"conversations": [HUMAN, GPT | {"reasoning_content": "Hm."}]}
    assert parse(fields, "sharegpt").messages[1] == {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": "Hm.",
    }


def test_a_field_that_occurs_twice_is_refused():
    text = '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
    with pytest.raises(RecordError, match="the field 'content' occurs twice in one object; keep one of them"):
        parse_record(Record("f", 1, text.encode()))


REFUSED = {
    "mixed": ("sharegpt", SAME["alpaca"], "the record is alpaca in a file of ShareGPT; keep each format"),
    "no turns": ("sharegpt", {"conversations": []}, 'no conversations; write "conversations": [{"from": "human"'),
    "another name": ("sharegpt", {"dialog": TURNS}, "its column dialog holds the turns: rename it to conversations"),
    "texts": ("sharegpt", {"conversations": ["Hi", 1]}, 'turn 1 is not {"from": ..., "value": ...}'),
    "a question alone": ("sharegpt", {"conversations": ["Hi"]}, "the last turn is the user"),
    "pair with more": (
        "sharegpt",
        {"conversation": [{"human": "a", "assistant": "b", "score": 1}]},
        "turn 1 has the field 'score', which is not supported; remove it",
    ),
    "several replies": (
        "alpaca",
        {"instruction": "a", "output": "b", "response": "c"},
        "the record has several replies, output and response; keep one of them",
    ),
    "context": (
        "completion",
        {"question": "a", "answer": "b", "context": "c"},
        "the record has context beside its question; write it in the question, or remove the field",
    ),
    "choices": ("completion", {"question": "a", "answer": "b", "choices": ["b"]}, "the record has choices beside"),
    "no calls": ("messages", {"query": "a", "answers": "[]", "tools": "[]"}, "the answers are empty; write the reply"),
    "answers": ("messages", {"query": "a", "answers": "f(1)", "tools": "[]"}, "the field answers is not JSON; write"),
    "weight": (
        "messages",
        {"messages": TURNS, "weight": 0.5},
        "the record has weight 0.5, and all records are trained equally; leave the record out,",
    ),
    "not trained": ("alpaca", SAME["alpaca"] | {"train": False}, "the record has train False, and all records"),
    "train 0": ("alpaca", SAME["alpaca"] | {"train": 0}, "the record has train 0, and all records"),
    "field of a reply": (
        "completion",
        {"prompt": "a", "completion": "b", "reasoning_content": "I think."},
        "the record has reasoning_content beside its reply; write the reply as a message",
    ),
    "unwanted": ("completion", {"prompt": "a", "completion": "b", "label": False}, "the record has label false, which"),
    "pair": ("messages", {"chosen": TURNS, "rejected": TURNS}, "no messages; the record is a preference pair; write"),
    "variables": (
        "messages",
        {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": True, "xml_tools": []}},
        "the record has the template variables enable_thinking; keep records with equal ones in one file, and give --t",
    ),
    "part that is context": (
        "messages",
        {"messages": [TURNS[0], TURNS[1] | {"content": [{"type": "text", "text": "a", "train": False}]}]},
        "message 2 has a part that is not trained; a reply is trained or not: mark the turn",
    ),
    "call as a part": (
        "messages",
        {"messages": [TURNS[0] | {"content": [{"type": "tool_use", "name": "f", "input": {}}]}, TURNS[1]]},
        "message 1 has content of type 'tool_use'; only text can be trained on: give it in a turn of the assistant",
    ),
    "two system fields": (
        "messages",
        {"messages": TURNS, "system": "Be terse.", "system_prompt": "Be kind."},
        "the record has two fields, system and system_prompt; keep one",
    ),
    "unknown": ("sharegpt", sharegpt({"from": "narrator", "value": "x"}), "turn 1 is from the unknown 'narrator'"),
    "field": ("sharegpt", sharegpt(HUMAN, GPT | {"score": 0}), "turn 2 has the field 'score'"),
    "no value": ("sharegpt", sharegpt(HUMAN, {"from": "gpt"}), "the content of message 2 is not a string"),
    "call": (
        "sharegpt",
        sharegpt(HUMAN, {"from": "function_call", "value": "tide()"}),
        "the call of turn 2 is not",
    ),
    "no instruction; write": ("alpaca", {"instruction": " ", "output": "x"}, "no instruction; write"),
    "nothing": ("alpaca", {"id": 1}, "no instruction; write"),
    "no output": ("alpaca", {"instruction": "x"}, "the output is not a string"),
    "input": ("alpaca", {"instruction": "x", "input": 3, "output": "y"}, "the input is not a string"),
    "history": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["z"]]},
        "the history is not a list of",
    ),
    "tools": ("messages", {"messages": TURNS, "tools": [1]}, "the tools are not a list of objects"),
    "functions too": (
        "messages",
        {"messages": TURNS, "tools": [{"name": "a"}], "functions": [{"name": "a"}]},
        "the record has tools and functions; keep one of them",
    ),
    "two systems": (
        "messages",
        {"messages": [SYSTEM, *TURNS], "system": "Be terse."},
        "the record has a field system and another system turn; keep one",
    ),
    "system": ("messages", {"messages": TURNS, "system": {"a": 1}}, "the system is {'a': 1}; write plain text"),
    "images": ("messages", {"messages": TURNS, "images": ["a.png"]}, "the record has images, and only text can be"),
    "image": ("sharegpt", sharegpt(HUMAN, GPT) | {"image": "a.png"}, "the record has image, and only text can be"),
    "thought as a part": (
        "messages",
        {"messages": [TURNS[0], TURNS[1] | {"content": [{"type": "reasoning", "text": "x"}]}]},
        "message 2 has content of type 'reasoning'; only text can be trained on: give it as reasoning_content",
    ),
    "surrogate": ("messages", {"messages": TURNS, "tools": [{"a": "\ud800"}]}, "a text of the tools has half of a"),
}


@pytest.mark.parametrize(("form", "fields", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_does_not_say_is_refused(form: str, fields: dict, reason: str):
    with pytest.raises(RecordError, match=re.escape(reason)) as caught:
        parse(fields, form)
    assert ";" in str(caught.value), "says what to do"


def test_a_chat_that_has_its_text_beside_it_is_a_chat(tmp_path: Path):
    for form, record in SAME.items():
        assert detect(write_records(tmp_path / "records.jsonl", [record | {"text": "The sea."}])) == form
