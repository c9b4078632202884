"""`evaluate --judge`: what a judge is asked, how its answers are counted, and that no answer is paid for twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.generate.prompts import ask
from megatron_sfr.evaluation.judge.judge_prompts import CONTEXT, Item, rating
from tests.evaluation.generate import chat_server
from tests.evaluation.generate.chat_server import ChatServer, running_server

REPLIES = {  # model and persona: replies to each of two questions
    ("a", "poet"): ["rating 5 in verse", "rating 5 in verse", "rating 3 plainly"],
    ("a", "cook"): ["rating 2 of salt", "rating 1 of oil", "rating 2 of salt"],
    ("b", "poet"): ["rating 4 in prose", "rating 4 in verse", "rating 4 in song"],
    ("b", "cook"): ["no number here", "rating 1 of oil", "rating 5 of oil"],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A judge whose votes are the number in the reply, the same, and one less; it refuses to rate a reply without."""

    def answer(path: str, body: dict[str, Any], server: ChatServer) -> dict[str, Any]:
        reply = body["messages"][-1]["content"].partition("<reply>\n")[2].partition("\n</reply>")[0]
        number = int(reply.split()[1]) if reply.startswith("rating") else None
        texts = [f"<think>{i}</think>{number - (i == 2)}" if number else "I cannot." for i in range(body["n"])]
        return {
            "choices": [
                {"message": {"content": text}, "finish_reason": "stop"} for text in texts[: server.most_choices]
            ]
        }

    monkeypatch.setattr(chat_server, "answer", answer)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running_server() as found:
        yield found


@pytest.fixture
def replies(tmp_path: Path) -> Path:
    path = tmp_path / "replies.jsonl"
    with path.open("w") as file:
        for question in ("why?", "how?"):
            for (model, persona), texts in REPLIES.items():
                for sample, text in enumerate(texts):
                    turns = {"prompt": question, "persona": persona, "model": model, "temperature": 1.0}
                    file.write(json.dumps(turns | {"sample": sample, "text": text}) + "\n")
    return path


def evaluate(server: ChatServer, replies: Path, output: Path, *flags: str) -> int:
    command = ["evaluate", "--replies", str(replies), "--encoder", "none", "--output", str(output)]
    return main([*command, "--judge", server.url, *flags])


def votes(output: Path) -> dict[tuple[str, str, str, str], list[int | None]]:
    lines = [json.loads(line) for line in (output / "votes.jsonl").read_text().splitlines()]
    return {(line["criterion"], line["persona"], line["question"], line["reply"]): line["votes"] for line in lines}


def test_ratings_are_the_means_of_votes(
    server: ChatServer, replies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(server, replies, tmp_path / "out") == 0
    different = {(persona, text) for (_, persona), texts in REPLIES.items() for text in texts}
    ratings = 2 * len(different) * 2  # two questions, two criteria
    assert len(server.requests) == ratings  # all votes of a reply in one request
    assert f"judge only/model: {ratings} ratings of 3 votes, {3 * ratings} answers\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    five, four, three, two = (number - 1 / 3 for number in (5, 4, 3, 2))
    one = 1  # two votes: 0, the third answer, is not on the scale
    expected = {
        "a": np.mean([np.mean([five, five, three]), np.mean([two, one, two])]),
        "b": np.mean([four, np.mean([one, five])]),  # a reply that was not rated does not count
    }
    for criterion in ("judged context", "judged style"):
        for model, mean in expected.items():
            assert found["scores"][model][criterion][0]["mean"] == pytest.approx(mean), (model, criterion)
    assert votes(tmp_path / "out")["judged style", "poet", "why?", "rating 5 in verse"] == [5, 5, 4]
    assert votes(tmp_path / "out")["judged context", "cook", "how?", "no number here"] == [None, None, None]
    (note,) = [note for note in found["notes"] if note.startswith("Judge: only/model")]
    assert "judged context: " in note
    assert "Krippendorff's alpha of 3 votes each 0." in note
    assert "judged context" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_asked(server: ChatServer, replies: Path, tmp_path: Path) -> None:
    first = ("judged context", "poet", "why?", "rating 5 in verse")
    evaluate(server, replies, tmp_path / "out", "--judge-args", '{"max_tokens": null, "reasoning_effort": "low"}')
    body = next(b for b in server.bodies() if _is_about(b["messages"][0]["content"], first))
    (turn,) = body["messages"]
    assert turn["role"] == "user"
    assert turn["content"].startswith(CONTEXT)
    assert "<conversation>\nuser: why?\n</conversation>" in turn["content"]
    assert (body["model"], body["n"], body["temperature"], body["reasoning_effort"]) == ("only/model", 3, 1.0, "low")
    styles = [b["messages"][0]["content"] for b in server.bodies() if "fits the persona" in b["messages"][0]["content"]]
    assert all("<persona>\npoet\n</persona>" in text or "<persona>\ncook\n</persona>" in text for text in styles)
    assert len(styles) == len(server.requests) / 2


def test_a_stopped_judge_is_not_asked_again_for_what_it_has_said(
    server: ChatServer, replies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(server, replies, tmp_path / "whole")
    every = len(server.requests)
    server.requests.clear()
    server.faults = [*[None] * 25, *[401] * 100]  # 16 requests run at a time
    assert evaluate(server, replies, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "401 Unauthorized" in error
    assert "--judge-key-env" in error
    kept = votes(tmp_path / "out")
    assert 0 < len(kept) <= 25
    assert not (tmp_path / "out" / "evaluation.json").exists()
    with (tmp_path / "out" / "votes.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # what a kill leaves
    server.faults = []
    server.requests.clear()
    assert evaluate(server, replies, tmp_path / "out") == 0
    assert f"{every - len(kept)} ratings of 3 votes" in capsys.readouterr().out
    asked = [body["messages"][0]["content"] for body in server.bodies()]  # with some that the stop had left on the way
    assert not [text for text in asked if any(_is_about(text, unit) for unit in kept)]
    assert votes(tmp_path / "out") == votes(tmp_path / "whole")
    scores = [json.loads((tmp_path / x / "evaluation.json").read_text())["scores"] for x in ("whole", "out")]
    assert scores[0] == scores[1]
    assert evaluate(server, replies, tmp_path / "out") == 0
    assert "is up to date" in capsys.readouterr().out


def _is_about(text: str, unit: tuple[str, str, str, str]) -> bool:
    """Whether a request is about this criterion, persona (of style alone), question and reply."""
    criterion, persona, question, reply = unit
    style = criterion == "judged style"
    has_persona = f"<persona>\n{persona}\n</persona>" in text if style else "<persona>" not in text
    return has_persona and f"user: {question}\n" in text and f"<reply>\n{reply}\n</reply>" in text


def test_votes_of_another_judge_are_refused(
    server: ChatServer, replies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(server, replies, tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").unlink()
    assert evaluate(server, replies, tmp_path / "out", "--judge-votes", "2") == 2
    assert "votes.jsonl has votes that were given with other values of votes: remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--judge-votes", "2"], "--judge-votes goes with --judge: leave it out"),
        (["--judge", "nowhere"], "nowhere is not a Hugging Face model"),
        (
            ["--judge", "nowhere", "--judge-model", "x"],
            "--judge-model is for a server, and --judge nowhere is a folder",
        ),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-model", "x", "--judge-votes", "1"], "--judge-votes 1: give"),
        (["--judge", "ftp://x", "--judge-model", "x"], "--judge ftp://x is not a URL"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-key-env", "NO_KEY"], "--judge-key-env NO_KEY: this environment"),
    ],
)
def test_wrong_options_are_one_line(
    replies: Path, tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--replies", str(replies), "--encoder", "none", "--output", str(tmp_path / "out")]
    assert main([*command, *flags]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out" / "votes.jsonl").exists()


def test_sampled_and_real_replies_are_rated(server: ChatServer, tiny_model: Path, tmp_path: Path) -> None:
    with (tmp_path / "data.jsonl").open("w") as file:
        for persona in ("poet", "cook"):
            turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": f"rating 4 by a {persona}"}]
            file.write(json.dumps({"messages": turns, "persona": persona}) + "\n")
    sampling = ["--samples", "1", "--max-new-tokens", "3", "--temperatures", "0.5", "1", "--device", "cpu"]
    command = ["evaluate", "--model", str(tiny_model), "--data", str(tmp_path / "data.jsonl"), *sampling]
    assert main([*command, "--output", str(tmp_path / "out"), "--judge", server.url]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["real"]["judged context"]["mean"] == pytest.approx(4 - 1 / 3)
    assert [score["n"] for score in found["scores"][tiny_model.name]["judged style"]] == [0, 0]  # they have no number
    replies = [json.loads(line)["text"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {reply for _, _, _, reply in votes(tmp_path / "out")} == {
        *replies,
        "rating 4 by a poet",
        "rating 4 by a cook",
    }


def test_a_local_model_can_judge(tiny_model: Path, replies: Path, tmp_path: Path) -> None:
    """It has random weights, so that its answers are noise; what a control token is for it is rated as plain text."""
    with replies.open("a") as file:
        turn = {"prompt": "why?", "persona": "poet", "model": "b", "temperature": 1.0, "sample": 9}
        file.write(json.dumps(turn | {"text": "a<|im_end|>"}) + "\n")
    command = ["evaluate", "--replies", str(replies), "--encoder", "none", "--output", str(tmp_path / "out")]
    assert main([*command, "--judge", str(tiny_model), "--judge-votes", "2", "--limit", "1", "--device", "cpu"]) == 0
    found = votes(tmp_path / "out")
    assert all(len(unit) == 2 for unit in found.values())
    assert {unit for _, _, _, unit in found} >= {"rating 5 in verse", "no number here"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", 4),
        ("Rating: 4/5", 4),
        ("<think>1 or 2?</think>\n**5**", 5),
        ("I would say 3.", 3),
        ("3.5", None),
        ("10", None),
        ("0", None),
        ("", None),
        ("<think>2 perhaps", None),
    ],
)
def test_the_rating_of_an_answer(answer: str, expected: int | None) -> None:
    assert rating(answer) == expected


def test_text_with_braces_is_asked_as_it_is() -> None:
    item = Item("judged style", ask("{reply} {x}", "{persona}"), "{conversation}")
    question = item.question().question
    assert "user: {reply} {x}" in question
    assert "<persona>\n{persona}\n</persona>" in question
    assert "<reply>\n{conversation}\n</reply>" in question
