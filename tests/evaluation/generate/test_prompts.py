"""Prompts: what is shared between personas, what names a prompt, and which records are refused."""

import json
from pathlib import Path

import pytest

from megatron_sfr.evaluation.generate.prompts import ask, limit, read_asked, read_prompts, read_questions
from megatron_sfr.evaluation.generate.verbalized import with_instructions
from megatron_sfr.evaluation.judge.judge_prompts import CRITERIA, Item


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_personas_share_a_prompt_and_nothing_else() -> None:
    poet, robot, nobody = ask("Why?", "poet"), ask("Why?", "robot"), ask("Why?")
    assert poet.shared == robot.shared == nobody.shared != ask("How?", "poet").shared
    assert len({prompt.key for prompt in (poet, robot, nobody)}) == 3
    assert [message["role"] for message in poet.turns()] == ["system", "user"]
    assert poet.question == "Why?"


def test_replies_to_one_prompt_are_gathered(tmp_path: Path) -> None:
    records = [
        {"persona": persona, "messages": [turn("user", question), turn("assistant", f"{persona} {question} {i}")]}
        for question in ("Why?", "How?")
        for persona in ("poet", "robot")
        for i in range(2)
    ]
    asked = read_asked(write(tmp_path / "data.jsonl", *records))
    assert [(entry.prompt.persona, entry.prompt.question) for entry in asked] == [
        ("poet", "Why?"),
        ("robot", "Why?"),
        ("poet", "How?"),
        ("robot", "How?"),
    ]
    assert asked[2].texts == ["poet How? 0", "poet How? 1"]
    assert [entry.prompt.question for entry in limit(asked, 1)] == ["Why?", "Why?"]
    assert limit(asked, 9) == asked


def test_prompts_come_in_two_shapes_and_lose_their_reply(tmp_path: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "Why?", "persona": "poet"},
        {"messages": [turn("user", "Why?"), turn("assistant", "Because.")], "persona": "poet"},
        {"messages": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Ho"), turn("user", "And?")]},
    )
    prompts = read_prompts(path)
    assert prompts[0] == ask("Why?", "poet")  # the second record asks the same
    assert [message["content"] for message in prompts[1].turns()] == ["Be brief.", "Hi", "Ho", "And?"]
    assert len(prompts) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ({"text": "a"}, "not a prompt"),
        ({"prompt": "a", "messages": []}, "has prompt and messages; keep one"),
        ({"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}}, "template variables enable_thinking"),
        ({"prompt": " "}, "is not a turn"),
        ({"messages": [turn("wizard", "a")]}, "is not a turn"),
        ({"messages": "a"}, "is not a turn"),
        ({"messages": []}, "no user turn"),
        ({"messages": [turn("system", "a")]}, "no user turn"),
        ({"prompt": "a", "persona": ""}, "persona is not text"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: object, reason: str) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "fine"}, record)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: .*{reason}"):
        read_prompts(path)


def test_a_prompt_may_be_written_as_in_the_data_of_prepare(tmp_path: Path) -> None:
    """Other fields null, the system turn as a field or empty, developer, parts of text, blanks around the persona."""
    path = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "Why?", "messages": None, "persona": " poet "},
        {"prompt": [turn("system", ""), turn("user", "Why?")], "persona": "poet"},
        {"prompt": "Why?", "system": "Be brief."},
        {"messages": [turn("developer", "Be brief."), {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
    )

    prompts = read_prompts(path)

    assert prompts[0] == ask("Why?", "poet")
    assert [message["content"] for message in prompts[1].turns()] == ["Be brief.", "Why?"]
    assert len(prompts) == 2
    call = {"role": "assistant", "content": "x", "tool_calls": [{"name": "tide", "arguments": {}}]}
    for record in (
        {"prompt": "a", "tools": [{"name": "tide"}]},
        {"messages": [turn("user", "a"), call, turn("user", "b")]},
    ):
        with pytest.raises(ValueError, match=r"prompts\.jsonl:1: tools are not sampled; leave this record out"):
            read_prompts(write(path, record))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_an_earlier_reply_is_part_of_the_prompt(tmp_path: Path, name: str) -> None:
    earlier = turn("assistant", "Ho") | {name: "Hm."}
    last = {"role": "assistant", "content": [{"type": "text", "text": "So."}], name: "Well."}
    path = write(tmp_path / "data.jsonl", {"messages": [turn("user", "Hi"), earlier, turn("user", "And?"), last]})
    expected = [turn("user", "Hi"), turn("assistant", "Ho") | {"reasoning_content": "Hm."}, turn("user", "And?")]

    (asked,), (question,), (prompt,) = read_asked(path), read_questions(path), read_prompts(path)

    assert asked.prompt == question.prompt == prompt
    assert prompt.turns() == expected
    assert asked.texts == question.texts == ["So."]
    assert with_instructions(prompt, 2).turns()[:-1] == expected[:-1]
    assert "assistant: Ho\n" in Item(next(iter(CRITERIA)), prompt, "So.").question().question
    for wrong in ({name: ["Hm."]}, {"reasoning": "Hm.", "thinking": "Hm."}):
        record = {"messages": [turn("user", "Hi"), turn("assistant", "Ho") | wrong, turn("user", "And?")]}
        with pytest.raises(ValueError, match=r"data\.jsonl:1: (the \w+ of )?message 2"):
            read_prompts(write(path, record))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(write(tmp_path / "prompts.jsonl"))


def test_tools_are_not_sampled(tmp_path: Path) -> None:
    record = {"messages": [turn("user", "Why?"), turn("assistant", "Because.")], "tools": [{"name": "tide"}]}
    with pytest.raises(ValueError, match=r"data\.jsonl:1: tools are not sampled; leave this record out"):
        read_asked(write(tmp_path / "data.jsonl", record))


def test_a_persona_that_is_only_a_field_is_not_in_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "Why?", "persona": "poet"})

    (prompt,) = read_prompts(path, "field")

    assert prompt == ask("Why?", "poet", "field")
    assert (prompt.persona, [message["role"] for message in prompt.turns()]) == ("poet", ["user"])
