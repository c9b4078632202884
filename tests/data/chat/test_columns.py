"""Records with the columns and lists of other trainers and of published datasets."""

import json
from pathlib import Path

import pytest

from megatron_sfr.data.chat.formats import detect
from megatron_sfr.storage.jsonl import RecordError
from tests.data.chat.test_formats import SYSTEM, TURNS, parse
from tests.data.records import write_records

PAIR = {"human": "and the sky", "assistant": "is grey"}


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("alpaca", {"query": "and the sky", "response": "is grey", "history": [["the sea", "is blue"]]}),  # ms-swift
        ("completion", {"system_prompt": "Be kind.", "question": "and the sky", "response": "is grey"}),  # OpenOrca
        ("completion", {"prompt": "and the sky", "response": "is grey"}),
        ("completion", {"input": [{"role": "user", "content": "and the sky"}], "output": "is grey", "reasoning": "on"}),
        ("alpaca", {"instruction": "and", "context": "the sky", "response": "is grey"}),  # Dolly
        ("alpaca", {"instruction": "and", "context": "the sky", "input": "", "output": "is grey"}),
        ("alpaca", {"instruction": "", "input": "and the sky", "output": "is grey"}),
        ("completion", {"question": "and the sky", "answer": "is grey"}),  # GSM8K
        ("completion", {"query": "and the sky", "answer": "is grey", "resource": "x"}),  # CodeFeedback
        ("completion", {"problem": "and the sky", "generated_solution": "is grey", "expected_answer": "x"}),
        ("completion", {"problem": "and the sky", "solution": "is grey", "weight": 1, "loss": 2.3, "train": None}),
        ("alpaca", {"instruction": "and the sky", "output": "is grey", "response": ""}),
        ("completion", {"input_text": "and the sky", "output_text": "is grey"}),  # Vertex AI
        ("sharegpt", {"conversations": [turn["content"] for turn in TURNS]}),  # LIMA
        ("sharegpt", {"id": "0", "data": [turn["content"] for turn in TURNS]}),  # UltraChat
        ("alpaca", {"id": 1, "data": ["a", "b"], "instruction": "and the sky", "output": "is grey"}),
        ("completion", {"id": 1, "data": ["a", "b"], "question": "and the sky", "answer": "is grey"}),
        ("alpaca", {"instruction": "and the sky", "output": "is grey", "contents": ["doc 1"]}),
        ("completion", {"question": "and the sky", "answer": "is grey", "contents": [{"parts": []}]}),
        ("completion", {"question": "and the sky", "answer": "is grey", "contents": []}),
        ("sharegpt", {"conversation": [{"human": "the sea", "assistant": "is blue"}, PAIR]}),  # ms-swift
        (
            "sharegpt",
            {"conversation": [{"input": "and the sky", "output": "is grey", "system": ""}]},
        ),  # Capybara, XTuner
        ("sharegpt", {"conversations": TURNS}),
        ("sharegpt", {"conversation": TURNS, "turn": 2}),  # LMSYS-Chat
        ("messages", {"messages": json.dumps(TURNS)}),
        ("messages", {"messages": [{"from": "human", "value": "and the sky"}, {"from": "gpt", "value": "is grey"}]}),
        ("messages", {"messages": TURNS, "query": "x", "response": "y", "label": True, "chat_template_kwargs": {}}),
    ],
)
def test_columns_of_trainers_and_datasets(tmp_path: Path, form: str, fields: dict):
    assert detect(write_records(tmp_path / "records.jsonl", [fields])) == form
    messages = parse(fields, form).messages

    assert messages[-1] == TURNS[3]
    assert " ".join(messages[-2]["content"].split()) == "and the sky"
    assert (messages[0] == SYSTEM) == ("system_prompt" in fields)


LEFT_OUT = ", and all records are trained equally; leave the record out, write {} to its replies, or remove the field"
TREE = {"text": "Why?", "role": "prompter", "replies": []}
CONTENT = {"role": "user", "parts": [{"text": "the sea"}]}
PAIR_OF_OPENAI = {"input": {"messages": TURNS[:3]}, "preferred_output": TURNS[3:], "non_preferred_output": TURNS[3:]}
REFUSED = {
    "s1K": (
        {"question": "a", "solution": "b", "thinking_trajectories": ["c"], "attempt": "d"},
        "no messages; the record is s1K's: choose a thought (reasoning_content) and an attempt",
    ),
    "s1K-1.1": (
        {"question": "a", "solution": "b", "deepseek_thinking_trajectory": "c", "deepseek_attempt": "d"},
        "no messages; the record is s1K's: choose a thought (reasoning_content) and an attempt",
    ),
    "Glaive": (
        {"system": "SYSTEM: Be kind.", "chat": "USER: a ASSISTANT: b <|endoftext|>"},
        "no messages; the record is Glaive's, all turns in one text: take them apart, calls as tool_calls; write",
    ),
    "OpenAI": (PAIR_OF_OPENAI, "no messages; the record is a preference pair of OpenAI's: take the messages of input"),
    "tree": (
        {"message_tree_id": "a", "tree_state": "b", "prompt": TREE},
        "no messages; the record is a tree of messages (OASST): write one for each path to a reply; write",
    ),
    "tokens": ({"input_ids": [1], "labels": [-100]}, "no messages; the record holds tokens of another tokenizer or"),
    "a file of one object": (
        {"version": 1, "rows": [{"messages": TURNS}]},
        "no messages; its column rows holds records: write each on a separate line; write",
    ),
    "a file of one object, with a faulty record": (
        {"rows": [{"instruction": "a", "output": "b", "response": "c"}]},
        "no messages; its column rows holds records: write",
    ),
    "another name": ({"dialog": TURNS}, "no messages; its column dialog holds the turns: rename it to messages; write"),
    "another name, ShareGPT": (
        {"turns": [{"from": "human", "value": "a"}]},
        "no messages; its column turns holds the turns",
    ),
    "another name than Glaive's": (
        {"system": "a", "chat": TURNS},
        "no messages; its column chat holds the turns: rename it to m",
    ),
    "no turns beside objects": ({"messages": [], "metadata": [{"k": 1}]}, 'no messages; write "messages": ['),
    "Gemini, a call": (
        {"contents": [{"role": "model", "parts": [{"functionCall": {"name": "f"}}]}]},
        "content 1 has the part {'functionCall': {'name': 'f'}}, and only text is read; write messages as OpenAI's",
    ),
    "Gemini, a thought": (
        {"contents": [{"role": "model", "parts": [{"text": "a", "thought": True}]}]},
        "content 1 has the part {'text': 'a', 'thought': True}, and only text is read; write messages as OpenAI's",
    ),
    "Gemini, a field": (
        {"contents": [CONTENT | {"x": 1}]},
        "content 1 has the field 'x', which is not supported; remove it",
    ),
    "Gemini, a field of the system": (
        {"systemInstruction": CONTENT | {"x": 1}, "contents": [CONTENT]},
        "systemInstruction has the field 'x', which is not supported; remove it",
    ),
    "Gemini, trained": ({"contents": [CONTENT | {"train": 2}]}, "message 1 has the train 2; write true or false"),
    "Gemini, tools": (
        {"contents": [CONTENT], "tools": [{}]},
        "the record has tools in Gemini's form, which is not read; wr",
    ),
    "Gemini, no parts": (
        {"contents": [CONTENT, "a"]},
        'content 2 has no parts; write {"role": ..., "parts": [{"text": ...}]}',
    ),
    "loss 0": ({"messages": TURNS, "loss": 0}, "the record has loss 0" + LEFT_OUT.format("loss")),
    "loss as text": ({"messages": TURNS, "loss": "False"}, "the record has loss 'False'" + LEFT_OUT.format("loss")),
    "mask 0.5": ({"messages": TURNS, "loss_mask": 0.5}, "the record has loss_mask 0.5" + LEFT_OUT.format("train")),
    "losses": ({"messages": TURNS, "loss": [0, 1]}, "the record has loss [0, 1]" + LEFT_OUT.format("loss")),
    "train as text": ({"messages": TURNS, "train": "no"}, "the record has train 'no'" + LEFT_OUT.format("train")),
    "mask": ({"messages": TURNS, "loss_mask": [0, 1]}, "the record has loss_mask [0, 1]" + LEFT_OUT.format("train")),
}


@pytest.mark.parametrize(("fields", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_record_cannot_say_here_is_named(fields: dict, reason: str):
    with pytest.raises(RecordError) as refused:
        parse(fields, "messages")
    assert str(refused.value).startswith(reason)


EXCLUDES_NOTHING = {"train": ("train", [], {}), "loss": (1, True, 1.37, "", [], {}, [1, 1])}
EXCLUDES_NOTHING |= {"loss_mask": (None, [], {}, 1, True, [1, 1], [True]), "weight": (None, [], 1.0, [1])}


@pytest.mark.parametrize(
    "fields", [{name: value} for name, values in EXCLUDES_NOTHING.items() for value in values], ids=str
)
def test_a_measured_loss_and_a_split_exclude_nothing(fields: dict):
    assert parse({"messages": TURNS} | fields, "messages").messages == TURNS


def test_messages_of_trees_are_named(tmp_path: Path):
    row = {"message_id": "a", "parent_id": None, "text": "Why?", "role": "prompter", "message_tree_id": "a"}
    with pytest.raises(ValueError, match=r"f\.jsonl holds the messages of trees \(OASST\), .*; write a record"):
        detect(write_records(tmp_path / "f.jsonl", [row]))
