"""Tasks of three formats, replies right, wrong and cheating, run for real; and pass@k from command line to files."""

import json
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.evaluation.code.sandbox import Limits, isolation_here
from megatron_sfr.evaluation.code.score import read_replies, verdict_of
from megatron_sfr.evaluation.code.tasks import Task, agrees, read_tasks

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


LEAST = "def least(a, b):\n    return a * b // gcd(a, b)\n"
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
        ("sum", "print(5)\nraise SystemExit(1)", "wrong answer"),  # judged by its output, as by LiveCodeBench
        ("sum", "print(5)\n1 / 0", "failed"),
        ("sum", f"{SUM.replace('import sys', 'from __future__ import annotations')}", "passed"),  # sys is imported
        (
            "sum",
            "def run():\n    for line in sys.stdin:\n        print(sum(map(int, line.split())))\n"
            "if __name__ == '__main__':\n    run()",
            "passed",
        ),
        (
            "pairs",
            "class Solution:\n    def pairs(self, a: List, b):\n        return [[x, b] for x in a]",
            "passed",
        ),
        ("pairs", "def pairs(a, b):\n    return tuple([x, b] for x in a)", "passed"),
        ("pairs", "def pairs(a, b):\n    return [(x, b) for x in a]", "wrong answer"),  # as LiveCodeBench judges
        ("HumanEval/x", f"{LEAST}\nif __name__ == '__main__':\n    print(least(int(input()), 2))", "passed"),
        (
            "7",
            "def twice(x):\n    return x + x\n\nif __name__ == '__main__':\n    import sys\n    sys.exit(3)",
            "passed",
        ),
        ("7", "import sys\nsys.exit(0)\ndef twice(x):\n    return x + x", "left early"),
        ("pairs", "def pairs(a, b):\n    return [[x, b] for x in a]", "passed"),
        ("pairs", "def pairs(a, b):\n    return a", "wrong answer"),
        ("pairs", "I cannot do that.", "failed"),
    ],
)
def test_a_reply_passes_if_and_only_if_it_is_right(tasks: dict[str, Task], task: str, reply: str, verdict: str) -> None:
    assert verdict_of(tasks[task], reply, Limits(), isolation_here()) == verdict


def test_programs_are_those_of_the_harnesses(tasks: dict[str, Task]) -> None:
    """Rewritten from openai/human-eval execution.py and bigcode-evaluation-harness mbpp.py."""
    for reply in ("    return a * b // gcd(a, b)\n", LEAST, "    x = '```'\n    return 1\n\n\nprint(least(1, 2))"):
        theirs = f"{HUMAN_EVAL['prompt']}{reply}\n{HUMAN_EVAL['test']}\ncheck(least)"
        assert [program.source for program in tasks["HumanEval/x"].programs(reply)] == [theirs]
    reply = "def twice(x):\n    return x + x"
    theirs = "\n".join([reply, *MBPP["test_list"]])
    assert [program.source for program in tasks["7"].programs(reply)] == [theirs]


def test_a_harness_of_live_code_bench_agrees(tasks: dict[str, Task]) -> None:
    """Its imports stand before a reply, whose calls are graded one by one."""
    [program] = tasks["pairs"].programs(
        "class Solution:\n    def pairs(self, a, b):\n        return list(product(a, [b]))"
    )
    known: dict[str, object] = {}
    exec(program.source.partition("\nimport json as _json")[0], known)
    assert {"deque", "heappush", "gcd", "Counter", "List", "Decimal", "reduce", "accumulate", "sys"} - known.keys() == {
        "Decimal"
    }


def test_a_function_without_a_body_is_not_doubled() -> None:
    task = Task("x", "", "import math\n\ndef f(a):\n", ("f",), continues=True, tests="check(f)")
    assert task.programs("    return a")[0].source == "import math\n\ndef f(a):\n    return a\ncheck(f)"
    assert task.programs("def f(a):\n    return 1")[0].source == "import math\n\ndef f(a):\n    return 1\ncheck(f)"


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("  1\n\t2", "1\n2", True),
        ("1  2", "1 2", True),  # numbers: word by word
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("0.50 2", "0.5 2.0", True),
        ("1e2", "100", True),
        ("50000000000000000", "50000000000000001", False),
        ("0.1", "0.10000001", False),
        ("YES 1.0", "YES 1", False),  # a word among them: as text
        ("", "\n", True),
        ("nan", "NaN", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_outputs_are_compared_as_live_code_bench_does(found: str, expected: str, equal: bool) -> None:
    assert agrees(found, expected) == agrees(expected, found) == equal


def test_prompts_are_written_and_replies_scored(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts, replies = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    assert main(["evaluate-code", "--tasks", str(path), "--write-prompts", str(prompts)]) == 0
    assert main(["evaluate-code", "--tasks", str(path), "--write-prompts", str(path)]) == 2, "they stay"
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
        ({**HUMAN_EVAL, "test": "def check(f):\n    assert " + "-" * 100_000 + "1"}, "nested too deeply"),
        ({**HUMAN_EVAL, "entry_point": "x" * 9000 + "!"}, "xx!' is not the name of a function"),
        ({key: value for key, value in HUMAN_EVAL.items() if key != "test"}, "the field 'test' is missing"),
        (HUMAN_EVAL | {"test": "def check(f):\n    pass\n"}, "test asserts nothing"),
        (HUMAN_EVAL | {"test": "assert add(1, 2) == 3"}, "test defines no function `check`"),
        (HUMAN_EVAL | {"prompt": 3}, "prompt is not a string"),
        (HUMAN_EVAL | {"entry_point": "a b"}, "entry_point 'a b' is not the name of a function"),
        (MBPP | {"task_id": 8, "test_list": []}, "test_list has no tests"),
        (MBPP | {"task_id": 8, "test_list": ["", " "]}, "test_list has no tests"),
        (MBPP | {"task_id": 8, "test_list": None}, "test_list has no tests"),
        (MBPP | {"task_id": 8, "test_list": ["pass"]}, "test_list asserts nothing"),
        (MBPP | {"task_id": 8, "test_list": ["assert True"]}, "test_list asserts nothing"),
        (MBPP | {"task_id": 8, "test_list": ["assert (twice(2) == 4, 'wrong')"]}, "test_list asserts nothing"),
        (MBPP | {"task_id": 8, "test_list": ["assert f("]}, "test_list is not Python"),
        (MBPP | {"task_id": 8, "test_list": "assert twice(2) == 4"}, "test_list is not a list of strings"),
        (MBPP | {"task_id": 8, "test_list": [1]}, "test_list is not a list of strings"),
        (MBPP | {"task_id": None}, "task_id is neither a string nor a number"),
        ([1], "a task is a JSON object"),
    ],
)
def test_a_record_that_is_not_a_task_is_refused_by_line(row: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(MBPP) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"tasks.jsonl:2: .*") as error:
        read_tasks(path)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"task_id": "a", "completion": "x"},
        {"task_id": "a", "solution": "x", "completion": None},
        {"question": "Do it. ", "text": "x"},
    ],
)
def test_fields_of_a_reply(tmp_path: Path, fields: dict) -> None:
    (tmp_path / "replies.jsonl").write_text(json.dumps(fields))
    (reply,) = read_replies(tmp_path / "replies.jsonl", [Task("a", "Do it.")])
    assert (reply.task, reply.text) == ("a", "x")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "has no replies"),
        ([{"task_id": "unknown", "completion": ""}], "replies.jsonl:1: not a reply to a task"),
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
