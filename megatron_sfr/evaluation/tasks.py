"""Programming tasks in the formats of HumanEval, MBPP and LiveCodeBench, and the programs that a reply turns into.

- HumanEval (and HumanEval+): task_id, prompt, entry_point, test
- MBPP: task_id, text or prompt, test_list, and test_setup_code or test_imports if any
- LiveCodeBench: question_id, question_content, public_test_cases and private_test_cases of {input, output, testtype},
  a list or JSON of one; starter_code; metadata with func_name, for functional tests. Private cases that are packed
  (base64 of a pickle) are refused: a pickle may run anything.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.data.lines import read_rows

FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
FUNCTIONAL = """
import json as _json
_case = _json.loads({case!r})
_call = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
_found = _call(*(_json.loads(_line) for _line in _case["input"].splitlines() if _line.strip()))
assert _json.loads(_json.dumps(_found)) == _json.loads(_case["output"]), "wrong answer"
"""


@dataclass(frozen=True)
class Program:
    """One run of a task: a source; with `expected` the output for `stdin` decides, else whether it reaches its end."""

    source: str
    stdin: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class Task:
    """prompt: what the model is asked. before: lines that stand before the reply's code; name: what it must define."""

    name: str
    prompt: str
    before: str = ""
    entry: str | None = None
    tests: str = ""  # run after the code
    cases: tuple[tuple[str, str], ...] = ()  # (stdin, stdout), each a run of its own

    def programs(self, reply: str) -> list[Program]:
        """All of them have to succeed."""
        code = self.complete(extract_code(reply))
        if self.cases:
            return [Program(code, given, expected) for given, expected in self.cases]
        return [Program(f"{code}\n\n{self.tests}")]

    def complete(self, code: str) -> str:
        """HumanEval's reply goes on after the prompt, or holds the function whole: then only imports are before it."""
        if self.entry is None or not self.before:
            return f"{self.before}\n{code}"
        definition = re.search(rf"^def {re.escape(self.entry)}\b", code, re.MULTILINE)
        before = self.before
        if definition:
            before = before[: before.rindex(f"def {self.entry}")] if f"def {self.entry}" in before else ""
        return f"{before}{code}"


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, its format known by its fields. ValueError `file:line: reason`."""
    tasks: dict[str, Task] = {}
    for row in read_rows(path):
        try:
            task = _parse(json.loads(row.text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            where = f"{row.source}:{row.line}"
            raise ValueError(f"{where}: no task of HumanEval, MBPP or LiveCodeBench: {reason}") from error
        if task.name in tasks:
            raise ValueError(f"{row.source}:{row.line}: the task {task.name} comes twice; keep one")
        tasks[task.name] = task
    if not tasks:
        raise ValueError(f"{path} has no tasks")
    return list(tasks.values())


def extract_code(reply: str) -> str:
    """The first fenced block of Python, or the whole reply where it has no fence."""
    found = FENCE.search(reply)
    return found[1] if found else reply


def agrees(found: str, expected: str) -> bool:
    """Equal line by line, but for spaces at the ends of lines and blank lines at the end."""
    return _lines(found) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _parse(row: dict[str, Any]) -> Task:
    if "entry_point" in row:
        tests = f"{row['test']}\n\ncheck({row['entry_point']})"
        return Task(str(row["task_id"]), row["prompt"], row["prompt"], row["entry_point"], tests)
    if "test_list" in row:
        before = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "")])
        text = row["text"] if "text" in row else row["prompt"]
        listed = "\n".join(row["test_list"])
        asked = f"{text}\nYour code should pass these tests:\n\n{listed}\n"
        return Task(str(row["task_id"]), asked, before, tests=listed)
    cases = list(_cases(row))
    name = str(row["question_id"])
    starter = row.get("starter_code") or ""
    asked = row["question_content"] + (f"\n\n{starter}" if starter else "")
    if not cases:
        raise ValueError(f"the task {name} has no test cases")
    if all(case["testtype"] == "stdin" for case in cases):
        return Task(name, asked, cases=tuple((case["input"], case["output"]) for case in cases))
    metadata = row["metadata"]
    function = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
    tests = "".join(FUNCTIONAL.format(case=json.dumps(case), name=function) for case in cases)
    return Task(name, asked, "from typing import *\n", None, tests)


def _cases(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    for field in ("public_test_cases", "private_test_cases"):
        cases = row.get(field) or []
        if isinstance(cases, str):
            try:
                cases = json.loads(cases)
            except ValueError as error:
                raise ValueError(f"{field} is no JSON (packed as a pickle?); write a list of cases") from error
        for case in cases:
            if case["testtype"] not in ("stdin", "functional"):
                raise ValueError(f"testtype {case['testtype']!r} is neither stdin nor functional")
            yield {key: str(case[key]) for key in ("input", "output", "testtype")}
