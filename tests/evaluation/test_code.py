"""Tasks of three formats, replies right, wrong and cheating, run for real; and pass@k from command line to files."""

import json
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.code import verdict_of
from megatron_sfr.evaluation.sandbox import Limits, isolation_here
from megatron_sfr.evaluation.tasks import Task, agrees, extract_code, read_tasks

HUMAN_EVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'from math import gcd\n\n\ndef least(a: int, b: int) -> int:\n    """Least common multiple."""\n',
    "entry_point": "least",
    "test": "def check(candidate):\n    assert candidate(4, 6) == 12\n    assert candidate(3, 5) == 15\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function twice that doubles.",
    "test_list": ["assert twice(2) == 4", "assert twice('a') == 'aa'"],
    "test_setup_code": "",
}
STDIN = {
    "question_id": "sum",
    "question_content": "Print the sum of the numbers in each line.",
    "public_test_cases": json.dumps([{"input": "1 2\n3 4\n", "output": "3\n7\n", "testtype": "stdin"}]),
    "private_test_cases": [{"input": "5\n", "output": "5", "testtype": "stdin"}],
}
FUNCTIONAL = {
    "question_id": "pairs",
    "question_content": "Return the pairs.",
    "starter_code": "class Solution:\n    def pairs(self, a: List[int], b: str):\n",
    "public_test_cases": [{"input": '[1, 2]\n"x"', "output": '[[1, "x"], [2, "x"]]', "testtype": "functional"}],
    "metadata": '{"func_name": "pairs"}',
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HUMAN_EVAL, MBPP, STDIN, FUNCTIONAL)))
    return path


@pytest.fixture(scope="module")
def tasks(path: Path) -> dict[str, Task]:
    return {task.name: task for task in read_tasks(path)}


SUM = "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))"


@pytest.mark.parametrize(
    ("task", "reply", "verdict"),
    [
        ("HumanEval/x", "    return a * b // gcd(a, b)", "passed"),
        ("HumanEval/x", "Here:\n```python\ndef least(a, b):\n    return a * b // gcd(a, b)\n```\nDone.", "passed"),
        ("HumanEval/x", "    return a * b", "wrong answer"),
        ("HumanEval/x", "    return 12", "wrong answer"),
        ("HumanEval/x", "    import sys; sys.exit(0)", "left early"),
        ("HumanEval/x", "    return 12\nimport os; os._exit(0)", "left early"),
        ("HumanEval/x", "    return a *", "failed"),
        ("7", "def twice(x):\n    return x + x", "passed"),
        ("7", "def twice(x):\n    return x * 2.0", "failed"),
        ("sum", SUM, "passed"),
        ("sum", f"{SUM}\nsys.exit(0)", "passed"),  # its output is judged, and is there
        ("sum", "print(3)\nprint(7)", "wrong answer"),  # right in public, wrong in private
        ("sum", "print('3\\n7')\nraise SystemExit(1)", "failed"),
        (
            "pairs",
            "class Solution:\n    def pairs(self, a: List, b):\n        return [(x, b) for x in a]",
            "passed",
        ),
        ("pairs", "def pairs(a, b):\n    return [[x, b] for x in a]", "passed"),
        ("pairs", "def pairs(a, b):\n    return a", "wrong answer"),
        ("pairs", "I cannot do that.", "failed"),
    ],
)
def test_a_reply_passes_if_and_only_if_it_is_right(tasks: dict[str, Task], task: str, reply: str, verdict: str) -> None:
    assert verdict_of(tasks[task], reply, Limits(), isolation_here()) == verdict


def test_code_is_what_stands_in_the_first_fence() -> None:
    assert extract_code("a\n```py\nx = 1\n```\n```python\ny = 2\n```") == "x = 1\n"
    assert extract_code("```\ncut off") == "cut off"
    assert extract_code("x = 1") == "x = 1"


def test_outputs_agree_but_for_white_space_at_ends() -> None:
    assert agrees("1 2 \n3\n\n", "1 2\n3")
    assert not agrees("1  2", "1 2")
    assert not agrees("1\n\n2", "1\n2")


def test_prompts_are_written_and_replies_scored(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts, replies = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    assert main(["evaluate-code", "--tasks", str(path), "--write-prompts", str(prompts)]) == 0
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert len(asked) == 4
    right = {"HumanEval/x": "    return a * b // gcd(a, b)", "7": "def twice(x): return x + x", "sum": SUM}
    rows = [{"task_id": name, "completion": text, "model": "m", "temperature": 0.8} for name, text in right.items()]
    rows += [row | {"completion": "0/0"} for row in rows]
    rows += [{"question": asked[3], "text": "no", "model": "m", "temperature": 0.8}] * 2  # a row of generate
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["evaluate-code", "--tasks", str(path), "--replies", str(replies), "--output", str(tmp_path / "out")]
    assert main(run) == 0
    [found] = json.loads((tmp_path / "out" / "code.json").read_text())["scores"]
    assert [estimate["mean"] for estimate in found["pass_at"]] == [
        3 / 8,
        3 / 4,
    ]
    assert found["outcomes"] == {"passed": 3, "failed": 5}
    assert found["tasks"]["pairs"] == [2, 0]
    page = (tmp_path / "out" / "code.md").read_text()
    assert "| model | temperature | tasks | pass@1 | pass@2 | failed | passed |" in page
    assert f"Sandbox: {isolation_here()} (" in page
    assert "0.375 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"task_id": 1}, "the field 'question_id' is missing"),
        ({**STDIN, "private_test_cases": "eJxrYJ0"}, "packed as a pickle?"),
        ({**STDIN, "public_test_cases": [], "private_test_cases": []}, "has no test cases"),
        ({key: value for key, value in HUMAN_EVAL.items() if key != "test"}, "the field 'test' is missing"),
    ],
)
def test_what_is_no_task_is_refused_by_line(row: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(MBPP) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"tasks.jsonl:2: .*") as error:
        read_tasks(path)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "has no replies"),
        ([{"task_id": "unknown", "completion": ""}], "replies.jsonl:1: no reply to a task"),
        ([{"task_id": "7", "completion": ""}], "has no reply to HumanEval/x"),
    ],
)
def test_replies_that_do_not_fit_are_refused(
    path: Path, rows: list[dict], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["evaluate-code", "--tasks", str(path), "--replies", str(replies), "--output", str(tmp_path)]
    assert main(run) == 2
    assert reason in capsys.readouterr().err
