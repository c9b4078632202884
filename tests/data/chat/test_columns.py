"""Records with the columns and lists of other trainers and of published datasets."""

import json
from pathlib import Path

import pytest

from megatron_sfr.data.chat.formats import detect
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
        ("sharegpt", {"conversations": [turn["content"] for turn in TURNS]}),  # LIMA
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


def test_messages_of_trees_are_named(tmp_path: Path):
    row = {"message_id": "a", "parent_id": None, "text": "Why?", "role": "prompter", "message_tree_id": "a"}
    with pytest.raises(ValueError, match=r"f\.jsonl holds the messages of trees \(OASST\), .*; write a record"):
        detect(write_records(tmp_path / "f.jsonl", [row]))
