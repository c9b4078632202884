"""Tasks in the formats of HumanEval, MBPP, LiveCodeBench and GSM8K, and the programs made from a reply.

- HumanEval (and HumanEval+): task_id, prompt, entry_point, test
- MBPP: task_id, text or prompt, test_list, and test_setup_code or test_imports if any
- LiveCodeBench: question_id, question_content, public_test_cases and private_test_cases of {input, output, testtype},
  a list or JSON of one; starter_code; metadata with func_name, for functional tests. Private cases that are packed
  (base64 of a pickle) are refused: a pickle may run anything.
- GSM8K: question and answer, and task_id if any; a final answer is compared, nothing is run

The programs and the comparison of outputs are those of the benchmarks' own harnesses: openai/human-eval
`execution.py`, bigcode-evaluation-harness `mbpp.py`, LiveCodeBench `testing_util.py`.
"""

import ast
import builtins
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_sfr.evaluation.code.code_blocks import extract_code
from megatron_sfr.evaluation.code.definitions import parses
from megatron_sfr.evaluation.code.exact_answers import reference_answer
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.user_files import cut, parse_json, shown

MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
LIVE_CODE_BENCH = (  # what LiveCodeBench's harness puts before every reply
    "".join(f"from {name} import *\n" for name in [*MODULES.split(), "builtins", "typing"])
    + "".join(f"import {name}\n" for name in MODULES.split())
    + "sys.setrecursionlimit(50000)\n\n"
)
FUNCTIONAL = """
import json as _json
_solution = Solution() if "Solution" in globals() else None
_call = getattr(_solution, {name!r}) if _solution is not None else globals()[{name!r}]
for _case in _json.loads({cases!r}):
    _found = _call(*(_json.loads(_line) for _line in _case["input"].split("\\n") if _line.strip()))
    _found = list(_found) if isinstance(_found, tuple) else _found
    assert _found == _json.loads(_case["output"]), "wrong answer"
"""
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """One run of a task. It passes if its output is `expected` or, without one, if the source reaches its end."""

    source: str
    stdin: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class Task:
    """A task, and how a reply to it becomes programs.

    Attributes:
        name: Its id.
        prompt: The model's prompt.
        before: Code that is put before the reply's code.
        defines: Names of which the reply's code has to define one; empty for a program.
        continues: Whether a reply may continue `before` (HumanEval) instead of standing alone.
        tests: Code that runs after the reply's.
        cases: (stdin, expected stdout), each a separate run.
        answer: The exact answer in canonical form; such a task has no programs.
    """

    name: str
    prompt: str
    before: str = ""
    defines: tuple[str, ...] = ()
    continues: bool = False
    tests: str = ""
    cases: tuple[tuple[str, str], ...] = ()
    answer: str | None = None

    def programs(self, reply: str) -> list[Program]:
        """The programs of a reply; all of them have to succeed."""
        source = self.complete(extract_code(reply, self.defines, self.before if self.continues else ""))
        if self.cases:
            return [Program(source, given, expected) for given, expected in self.cases]
        return [Program(f"{source}\n{self.tests}")]

    def complete(self, code: str) -> str:
        """The reply's code after `before`; imports from __future__ come first, as Python requires.

        If `before` is a function without a body, and the code defines that function itself, the header is left out.
        """
        before = self.before
        if self.continues and not parses(before):
            heads = list(re.finditer(rf"^def {re.escape(self.defines[0])}\b", before, re.MULTILINE))
            if heads and re.search(heads[0].re, code):
                before = before[: heads[-1].start()]
        future = "".join(line.rstrip("\n") + "\n" for line in FUTURE.findall(code)) if before else ""
        return future + before + (FUTURE.sub("", code) if future else code)


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, whose format follows from its fields. Raises ValueError `file:line: reason`."""
    tasks: dict[str, Task] = {}
    for record in read_records(path):
        try:
            task = _parse(parse_json(record.text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            where = f"{record.source}:{record.line}"
            raise ValueError(f"{where}: not a task of HumanEval, MBPP, LiveCodeBench or GSM8K: {reason}") from error
        if task.name in tasks:
            raise ValueError(f"{record.source}:{record.line}: the task {cut(task.name)} occurs twice; keep one")
        tasks[task.name] = task
    if not tasks:
        raise ValueError(f"{path} has no tasks")
    return list(tasks.values())


def agrees(found: str, expected: str) -> bool:
    """Whether outputs are equal line by line, ignoring white space at the ends of lines and of the text.

    Lines that differ are equal if all their words are decimal numbers of equal value: `1.0` and `1.00`.
    """
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(lines) == len(wanted) and all(
        line == other or _equal_numbers(line, other) for line, other in zip(lines, wanted, strict=True)
    )


def _equal_numbers(line: str, other: str) -> bool:
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in other.split()]
    except InvalidOperation:
        return False


def _parse(record: object) -> Task:
    if not isinstance(record, dict):
        raise ValueError("a task is a JSON object")
    if "entry_point" in record:
        return _human_eval(record)
    if "test_list" in record:
        return _mbpp(record)
    if "answer" in record and "question" in record:
        return _exact(record)
    return _live_code_bench(record)


def _human_eval(record: dict[str, Any]) -> Task:
    prompt, entry, test = (_text(record, field) for field in ("prompt", "entry_point", "test"))
    if not entry.isidentifier():
        raise ValueError(f"entry_point {shown(entry)} is not the name of a function")
    tree = _tests("test", test)
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise ValueError("test defines no function `check`")
    return Task(_name(record, "task_id"), prompt, prompt, (entry,), True, f"{test}\ncheck({entry})")


def _mbpp(record: dict[str, Any]) -> Task:
    tests, imports = (_texts(record, field) for field in ("test_list", "test_imports"))
    if not any(test.strip() for test in tests):
        raise ValueError("test_list has no tests, so that every reply would pass")
    setup = _text(record, "test_setup_code") if record.get("test_setup_code") else ""
    listed = "\n".join(tests)
    called = {
        node.func.id
        for node in ast.walk(_tests("test_list", listed))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    before = "".join(f"{part}\n" for part in [*imports, setup] if part)
    asked = (
        f"{_text(record, 'text' if 'text' in record else 'prompt')}\nYour code should pass these tests:\n\n{listed}\n"
    )
    return Task(_name(record, "task_id"), asked, before, tuple(sorted(called - vars(builtins).keys())), tests=listed)


def _live_code_bench(record: dict[str, Any]) -> Task:
    name = _name(record, "question_id")
    starter = record.get("starter_code") or ""
    asked = _text(record, "question_content") + (f"\n\n{starter}" if starter else "")
    cases = list(_cases(record))
    if not cases:
        raise ValueError("the task has no test cases")
    if all(case["testtype"] == "stdin" for case in cases):
        return Task(name, asked, LIVE_CODE_BENCH, cases=tuple((case["input"], case["output"]) for case in cases))
    metadata = record["metadata"]
    function = _text(json.loads(metadata) if isinstance(metadata, str) else metadata, "func_name")
    tests = FUNCTIONAL.format(cases=json.dumps(cases), name=function)
    return Task(name, asked, LIVE_CODE_BENCH, ("Solution", function), tests=tests)


def _exact(record: dict[str, Any]) -> Task:
    question = _text(record, "question")
    name = _name(record, "task_id") if "task_id" in record else question
    given = record["answer"]
    number = type(given) in (int, float)
    return Task(name, question, answer=reference_answer(str(given) if number else _text(record, "answer")))


def _name(record: dict[str, Any], field: str) -> str:
    if not isinstance(record[field], str | int):
        raise ValueError(f"{field} is neither a string nor a number")
    return str(record[field])


def _text(record: dict[str, Any], field: str) -> str:
    if not isinstance(record[field], str):
        raise ValueError(f"{field} is not a string")
    return record[field]


def _texts(record: dict[str, Any], field: str) -> list[str]:
    texts = record.get(field) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{field} is not a list of strings")
    return texts


def _tests(field: str, code: str) -> ast.Module:
    """The parsed tests. Raises ValueError if they are not Python or cannot fail, so that every reply would pass."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"{field} is not Python: {error.msg}, line {error.lineno}") from error
    except (MemoryError, RecursionError) as error:  # what the parser raises for code that is nested too deeply
        raise ValueError(f"{field} is not Python that can be parsed: it is nested too deeply") from error
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    if not any(map(_can_fail, ast.walk(tree))) and "assert" not in " ".join(calls):
        raise ValueError(f"{field} asserts nothing, so that every reply would pass")
    return tree


def _can_fail(node: ast.AST) -> bool:
    """Whether a statement may end a test; `assert True` and `assert (x == 1, "text")` never do."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant | ast.Tuple) or ast.unparse(node.test) == "False"
    return isinstance(node, ast.Raise)


def _cases(record: dict[str, Any]) -> Iterator[dict[str, str]]:
    for field in ("public_test_cases", "private_test_cases"):
        cases = record.get(field) or []
        if isinstance(cases, str):
            try:
                cases = json.loads(cases)
            except ValueError as error:
                raise ValueError(f"{field} is not JSON (packed as a pickle?); write a list of cases") from error
        for case in cases:
            if case["testtype"] not in ("stdin", "functional"):
                raise ValueError(f"testtype {shown(case['testtype'])} is neither stdin nor functional")
            yield {key: str(case[key]) for key in ("input", "output", "testtype")}
