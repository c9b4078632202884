"""Final answers: where they stand in a reply, which are equal, and a GSM8K file scored from prompts to the plot."""

import json
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.code.exact_answers import canonical, final_answer, reference_answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("48 / 2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("First 3, then 5. The answer is 1,200.00.", "1200"),
        ("The answer is **$18** per day.\n", "18"),
        (r"So \boxed{\frac{1}{2}} of 7.", "1/2"),
        (r"\boxed{3} no, \boxed{x^{2}+1}.", "x^{2}+1"),
        ("Final Answer: Paris.", "paris"),
        ("The answer is: 7 apples. I hope this helps.", "7"),
        ("The answer is:\n\\[ 7 \\]", "7"),
        ("The answer is:\n\n42\n\nThat took 3 steps.", "42"),
        ("Answer:\n42 apples per day\n\nHe began with 7.", "42"),
        ("**Answer**\n\n$42$\n\nCheck: 6 * 7.", "42"),
        ("**Final Answer:**\n\n$$\n-4\n$$\n(of 7)", "-4"),
        ("**Answer**: Paris\nIn 1 word.", "paris"),
        ("The answer is\n\\[ \\frac{1}{2} \\]\nof 7", "1/2"),
        ("Final answer = 5.\nIt took 2 steps.", "5"),
        ("#### \n42\n\nQuestion: 7?", "42"),
        ("#### Final Answer\n42\nin 3 steps", "42"),
        ("#### Answer: 42", "42"),
        ("#### yes\n", "yes"),
        ("#### Step 1: count\n6\n#### Step 2: add\n6 + 6 = 12\n#### Conclusion\nHe has 12.", "12"),
        ("#### 1. Count\nThere are 12.", "12"),
        ("#### Step 2: add\n\\boxed{12}", "12"),
        ("The answer is 18. Janet sells 9 eggs.", "18"),
        ("The answer is 18. (This uses 3 eggs.)", "18"),
        ("Let's find the answer:\n\nStep 1: Multiply 3 by 4.\nThat makes 12.", "12"),
        ("Here's how to get the answer:\n\n3 * 4 = 12\n\nSo she pays 24.", "24"),
        ("Answer:\nStep 1\n5\nStep 2\n9", "9"),
        ("Answer:\n\nSolution\n\nHe has 9.", "9"),
        ("Answer:\n(B)\n\nThis is 1 of 4.", "(b)"),
        ("### Answer:\nTotal cost = 3 * 4 = 12", "12"),
        ("#### (B)\n\nBye to 5.", "(b)"),
        ("#### Paris\n<|im_end|>", "paris"),
        ("#### €18\n\nQuestion: 3?", "18"),
        ("#### Yes.\n\nBecause 3 is odd.", "yes"),
        ("\\boxed{7}. But per person:\n#### 12", "12"),
        ("To find the answer:\n\n1. Multiply 3 by 4.\n2. That makes 12.", "12"),
        ("The answer is:\nFirst we multiply three by four, then we have 12.", "12"),
        ("The answer is:", None),
        ("It costs 5 and then 3.5 dollars.", "7/2"),
        ("He has -4.", "-4"),
        ("<think>The answer is 3.</think>The answer is 4.", "4"),
        ("I cannot tell.", None),
        ("", None),
        ("9" * 5000, "9" * 5000),
        ("1/0", "1/0"),  # not a number: as text
    ],
)
def test_the_final_answer_is_the_last_marked_one_or_the_last_number(reply: str, answer: str | None) -> None:
    assert final_answer(reply) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0.5", "1/2", True),
        ("$1,000", "1000.0", True),
        ("50%", "50", True),
        ("12 apples", "12", True),
        ("Paris.", "paris", True),
        ("(3, 4)", "3", False),
        ("2x", "2", False),
        ("2x", "2y", False),
        ("1,23", "123", False),
    ],
)
def test_answers_are_compared_as_numbers_else_as_text(one: str, other: str, equal: bool) -> None:
    assert (canonical(one) == canonical(other)) == equal


def test_a_blank_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="the answer is blank"):
        reference_answer("#### .")


def test_questions_are_scored_by_pass_best_and_majority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [{"question": "6 * 7?", "answer": "It is 42.\n#### 42"}, {"question": "Half?", "answer": 0.5, "task_id": 3}]
    path, prompts, replies = (tmp_path / name for name in ("gsm.jsonl", "prompts.jsonl", "replies.jsonl"))
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    assert main(["evaluate-code", "--tasks", str(path), "--write-prompts", str(prompts)]) == 0
    assert [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()] == ["6 * 7?", "Half?"]
    found = [  # question or task, text, utility, logprob of 2 tokens
        ({"question": "6 * 7?"}, "The answer is 42.", 0.1, -1.0),
        ({"question": "6 * 7?"}, "42", 0.2, -2.0),
        ({"question": "6 * 7?"}, "41", 0.9, -8.0),
        ({"task_id": 3}, "1/2", 0.3, -3.0),
        ({"task_id": 3}, "2", 0.2, -1.0),
        ({"task_id": 3}, "Nobody knows.", 0.1, -0.1),
    ]
    rows = [task | {"text": text, "utility": u, "logprob": p, "tokens": 2} for task, text, u, p in found]
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["evaluate-code", "--tasks", str(path), "--replies", str(replies), "--output", str(tmp_path / "out")]
    assert main(run) == 0
    [scores] = json.loads((tmp_path / "out" / "code.json").read_text())["scores"]
    assert scores["outcomes"] == {"passed": 3, "wrong answer": 2, "no answer": 1}
    mean = {name: [round(e["mean"], 6) for e in row] for name, row in scores["selected"].items()}
    assert [round(e["mean"], 6) for e in scores["pass_at"]] == [0.5, 0.833333, 1.0]
    assert mean["best by utility"] == [0.5, 0.5, 0.5]  # of k = 2: 1/3 of the pairs of one task, 2/3 of the other's
    assert mean["best by logprob"] == [0.5, 0.5, 0.5]
    assert mean["majority"][0] == pytest.approx(0.5, abs=0.05)
    assert mean["majority"][2] == 0.75  # 42 twice; 1/2 and 2 once each
    page = (tmp_path / "out" / "code.md").read_text()
    assert "## best by logprob of k" in page
    assert "Sandbox" not in page
    assert (tmp_path / "out" / "code.png").read_bytes().startswith(b"\x89PNG")
    replies.write_text(json.dumps(rows[0] | {"utility": "good"}) + "\n")
    assert main(run) == 2
    assert "replies.jsonl:1: the utility is 'good'" in capsys.readouterr().err
