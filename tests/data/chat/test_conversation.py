"""Records: what is read, what is refused and with which message; personas; prompts."""

import json
import re
from pathlib import Path

import pytest

from megatron_sfr.data.chat.conversation import parse_record, prompt_of, read_conversations
from megatron_sfr.data.chat.rendered_turns import persona_turn
from megatron_sfr.storage.jsonl import Record

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}

BAD_RECORDS = {
    "not JSON": (b"{messages}", "not JSON"),
    "too deep": (b"[" * 200_000, "not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8 (byte 14"),
    "not an object": (b"[1]", "not a JSON object"),
    "no messages": (b'{"id": "x"}', "no messages"),
    "no turns": ({"messages": []}, "no messages"),
    "message is text": ({"messages": ["Hi"]}, "message 1 is not an object"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 has the unknown role 'bot'"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "the content of message 2 is not a string"),
    "empty reply": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2 is an empty reply"),
    "empty early reply": ({"messages": [USER, {**REPLY, "content": ""}, USER, REPLY]}, "message 2 is an empty reply"),
    "ends on the user": ({"messages": [USER, REPLY, USER]}, "the last turn is the user's"),
    "no user turn": ({"messages": [SYSTEM, REPLY]}, "the first assistant turn answers no user turn"),
    "late system turn": ({"messages": [USER, SYSTEM, REPLY]}, "message 2 is a system turn"),
    "unknown field": ({"messages": [USER, {**REPLY, "name": "x"}]}, "message 2 has the field 'name'"),
    "fractional weight": ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "message 2 has the weight 0.5"),
    "train is a word": ({"messages": [USER, {**REPLY, "train": "no"}]}, "message 2 has the train 'no'; write true or"),
    "trained user": ({"messages": [{**USER, "train": True}, REPLY]}, "message 1 is the user's and cannot be trained"),
    "reasoning is a list": ({"messages": [USER, {**REPLY, "thinking": ["x"]}]}, "the thinking of message 2 is not a"),
    "reasoning twice": (
        {"messages": [USER, {**REPLY, "thinking": "x", "reasoning": "x"}]},
        "message 2 has reasoning under two names, reasoning and thinking; keep one",
    ),
    "call of nothing": ({"messages": [USER, {**REPLY, "tool_calls": [{}]}]}, "message 2 has a tool call without the"),
    "call without arguments": (
        {"messages": [USER, {**REPLY, "tool_calls": [{"function": {"name": "f"}}]}]},
        "message 2 has a tool call without arguments",
    ),
    "user calls a tool": ({"messages": [{**USER, "tool_calls": [1]}, REPLY]}, "message 1 has the field 'tool_calls'"),
    "plain text": (
        {"text": "x"},
        "the record is plain text in a file of messages; keep each format in a separate file",
    ),
    "another format": ({"instruction": "x", "output": "y"}, "the record is alpaca in a file of messages"),
    "tools are a word": ({"messages": [USER, REPLY], "tools": "all"}, "the tools are not JSON"),
    "half a surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "the content of message 1 has half of a surrogate",
    ),
    "persona is a number": ({"persona": 3, "messages": [USER, REPLY]}, "the persona is not a string"),
    "blank persona": ({"persona": " ", "messages": [USER, REPLY]}, "the persona is blank"),
}


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path: Path, record, reason):
    path = tmp_path / "records.jsonl"
    good = json.dumps({"messages": [USER, REPLY]}).encode()
    path.write_bytes(
        good + b"\n\n" + (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n" + good
    )

    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {reason}")) as caught:
        list(read_conversations(path))
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "says what to do"


def test_common_variants_of_records_are_read(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    null = {**USER, "tool_calls": None}
    text = json.dumps({"messages": [null, {"role": "assistant", "content": "a\u2028b"}], "id": 7}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n   \n")

    (conversation,) = read_conversations(path)

    assert conversation.messages == [USER, {"role": "assistant", "content": "a\u2028b"}]
    assert (conversation.source, conversation.line, conversation.persona) == (str(path), 1, None)


@pytest.mark.parametrize(
    ("persona", "system"),
    [
        ("pirate", "Answer in this persona: pirate."),
        ("The Devil's Dictionary", "Answer in this persona: The Devil's Dictionary."),
        ("You are a pirate.", "You are a pirate."),
        ("你是海盗。", "你是海盗。"),
        ("Rules:\n- be brief", "Rules:\n- be brief"),
    ],
)
def test_a_persona_becomes_the_system_turn_where_there_is_none(persona: str, system: str):
    def parse(messages):
        return parse_record(Record("f", 1, json.dumps({"messages": messages, "persona": f" {persona} "}).encode()))

    assert persona_turn(persona) == {"role": "system", "content": system}
    assert parse([USER, REPLY]).messages == [persona_turn(persona), USER, REPLY]
    assert parse([SYSTEM, USER, REPLY]).messages == [SYSTEM, USER, REPLY]
    assert parse([USER, REPLY]).persona == parse([SYSTEM, USER, REPLY]).persona == persona


def test_the_prompt_is_everything_before_the_last_reply():
    assert prompt_of([SYSTEM, USER, REPLY, USER, REPLY]) == [SYSTEM, USER, REPLY, USER]
    assert prompt_of([USER]) == [USER]
