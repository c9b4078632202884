"""Verbalized Sampling: what is asked, what can be read of an answer, and how a reply is drawn from it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.generate.prompts import ask
from megatron_sfr.evaluation.generate.sampling import Sampled
from megatron_sfr.evaluation.generate.verbalized import Candidate, candidates, drawn, weights_of, with_instructions
from tests.evaluation.generate.chat_server import running_server

TAGGED = """Sure!
<response>
  <text>A bear, a moon.</text>
  <probability>0.5</probability>
</response>
<response><text>Two
lines &c.</text><probability> 25% </probability></response>
<response><probability>.125</probability><text>Third</text></response>"""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TAGGED, [("A bear, a moon.", 0.5), ("Two\nlines &c.", 0.25), ("Third", 0.125)]),
        (f"<think><response><text>no</text></response></think>{TAGGED[-74:]}", [("Third", 0.125)]),
        (TAGGED[:-30], [("A bear, a moon.", 0.5), ("Two\nlines &c.", 0.25)]),  # cut off in the third text
        (TAGGED.replace("</response>", ""), [("A bear, a moon.", 0.5), ("Two\nlines &c.", 0.25), ("Third", 0.125)]),
        ("<response>bare<probability>0.1</probability></response>", [("bare", 0.1)]),
        ("<Response><Text>a</Text><Probability>~1e-2</Probability></Response>", [("a", 0.01)]),
        ("<response><text>a</text></response>", [("a", None)]),
        ("<response><text> </text><probability>1</probability></response>", []),
        ('[{"text": "a", "probability": 0.5}, {"text": "b", "probability": "10%"}]', [("a", 0.5), ("b", 0.1)]),
        ('```json\n{"responses": [{"text": "a {x}", "probability": 1}]}\n```', [("a {x}", 1.0)]),
        ('{"responses": [{"text": "a\nb", "probability": 0.5}, {"text": "c", "prob', [("a\nb", 0.5)]),  # cut off
        ('{"text": "a", "probability": -0.5} {"text": "b", "probability": 7}', [("a", None), ("b", None)]),
        ('{"text": "\\ud800", "probability": 0.5}', [("?", 0.5)]),
        ("I cannot do that.", []),
        ("", []),
        ("{" * 20_000, []),
        ('{"text": ' * 2_000, []),
    ],
)
def test_candidates_are_read_from_tags_or_json(answer: str, expected: list[tuple[str, float | None]]) -> None:
    assert candidates(answer) == [Candidate(*pair) for pair in expected]


def test_weights_are_normalized_and_unknown_ones_are_zero() -> None:
    assert weights_of([Candidate("a", 0.6), Candidate("b", None), Candidate("c", 0.2)]) == pytest.approx(
        [0.75, 0, 0.25]
    )
    assert weights_of([Candidate("a", None), Candidate("b", 0.0)]) == [0.5, 0.5]
    assert weights_of([]) == []


def test_replies_are_drawn_by_their_probabilities() -> None:
    answer = Sampled(0, TAGGED, (1, 2, 3), -4.0, True)
    found = [drawn(answer, 3, (i + 0.5) / 700) for i in range(700)]
    assert Counter(reply.text for reply in found) == {"A bear, a moon.": 400, "Two\nlines &c.": 200, "Third": 100}
    assert drawn(answer, 3, 0.0).text == "A bear, a moon."
    assert found[0].logprob is None
    assert found[0].length == 3
    assert found[0].verbalized is not None
    assert (found[0].verbalized.candidates, found[0].verbalized.answer) == (3, TAGGED)
    assert found[0].verbalized.probability == pytest.approx(4 / 7)


def test_an_answer_that_cannot_be_read_is_an_empty_reply() -> None:
    reply = drawn(Sampled(2, "Hello!", (1,), -1.0, False), 5, 0.3)
    assert (reply.sample, reply.text, reply.finished) == (2, "", False)
    assert reply.verbalized is not None
    assert (reply.verbalized.candidates, reply.verbalized.probability) == (0, None)


def test_the_instructions_are_put_before_the_last_turn() -> None:
    prompt = with_instructions(ask("Why {k}?", "poet"), 5)
    assert prompt.messages[0] == ask("x", "poet").messages[0]
    assert prompt.question.startswith("<instructions>\nGenerate 5 responses to the user query, each")
    assert prompt.question.endswith("</instructions>\n\nWhy {k}?")


def test_a_server_answers_with_distributions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers to `Why?` have the form, the others do not."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "Who?"}\n')
    with running_server() as server:
        server.form = lambda asked, text: TAGGED if asked.endswith("Why?") else text
        command = ["generate", "--server", server.url, "--server-model", "m", "--samples", "40"]
        command += ["--prompts", str(tmp_path / "prompts.jsonl")]
        output = tmp_path / "out.jsonl"
        assert main([*command, "--output", str(output), "--verbalized", "3"]) == 0
        assert all("Generate 3 responses" in body["messages"][-1]["content"] for body in server.bodies())
    assert "40 of 80 answers hold no reply" in capsys.readouterr().err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {record["question"] for record in records} == {"Why?", "Who?"}
    assert {record["text"] for record in records[:40]} == {"A bear, a moon.", "Two\nlines &c.", "Third"}
    assert {record["text"] for record in records[40:]} == {""}
    assert records[0]["verbalized"] | {"probability": 0} == {
        "k": 3,
        "candidates": 3,
        "probability": 0,
        "answer": TAGGED,
    }
    assert json.loads((tmp_path / ".out.jsonl.identity.json").read_text())["identity"]["verbalized"] == 3
    assert main([*command, "--output", str(output), "--verbalized", "4"]) == 2
    assert "made with other values of verbalized" in capsys.readouterr().err


def test_transformers_answers_too(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with random weights writes no tags: each answer is counted, and the reply is empty."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    command = ["generate", "--model", str(tiny_model), "--prompts", str(tmp_path / "prompts.jsonl"), "--samples", "3"]
    few = ["--max-new-tokens", "4", "--device", "cpu", "--verbalized", "2", "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, *few]) == 0
    assert "3 of 3 answers hold no reply" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(record["verbalized"]["candidates"] == 0 and record["verbalized"]["answer"] for record in records)


def test_a_distribution_has_two_replies(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_model), "--prompt", "Why?", "--verbalized", "1"]) == 2
    assert "--verbalized 1: a distribution has at least 2 replies" in capsys.readouterr().err
