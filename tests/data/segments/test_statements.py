"""Statements: which lines belong together, in languages that indent and in languages of braces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.data.segments.statements import statements

PYTHON = """\
import os

@cache
@retry(
    times=3,
)
def f(x):
    if x:
        return 1
    else:
        y = g(
            x,
        )

    return y
print(f(2))
"""
PYTHON_STATEMENTS = [
    "import os\n\n",
    PYTHON[PYTHON.index("@cache") : PYTHON.index("print")],
    "    times=3,\n",
    PYTHON[PYTHON.index("    if x") : PYTHON.index("    return y")],
    "        return 1\n",
    "        y = g(\n            x,\n        )\n\n",
    "            x,\n",
    "    return y\n",
    "print(f(2))\n",
]
C = """\
#include <a.h>
int f(int x)
{
\tif (x) {
\t\treturn 1;
\t} else {
\t\tx++;
\t}
\treturn x;
}

int g;
"""
C_STATEMENTS = [
    "#include <a.h>\n",
    C[C.index("int f") : C.index("int g")],
    C[C.index("\tif") : C.index("\treturn x")],
    "\t\treturn 1;\n",
    "\t\tx++;\n",
    "\treturn x;\n",
    "int g;\n",
]
MIXED = "Run this:\n\n```python\nx = 1\ny = 2\n```\n\nThen\n  ```sh\n  ls\n  ```\nDone, and\n```\n```\nend it.\nBye"
MIXED_STATEMENTS = [
    "Run this:\n\n",
    "```python\nx = 1\n",
    "y = 2\n```\n\n",
    "Then\n  ```sh\n  ls\n  ```\n",
    "  ```sh\n  ls\n  ```\n",
    "Done, and\n",
    "```\n```\nend it.\n",
    "Bye",
]
TEXTS = {
    "python": (PYTHON, PYTHON_STATEMENTS),
    "C": (C, C_STATEMENTS),
    "fences": (MIXED, MIXED_STATEMENTS),
    "a reply that begins inside a block": (
        "        a\n    } else {\n        b\n    }\nc",
        ["        a\n", "        b\n", "c"],
    ),
    "closing first": ("}\n) else\nx", ["}\n) else\n", "x"]),
    "ruby": ("def f\n  1\nrescue E\n  2\nend\nf", ["def f\n  1\nrescue E\n  2\nend\n", "  1\n", "  2\n", "f"]),
    "rust": ("#[test]\nfn f() {\n}\nfn g() {}", ["#[test]\nfn f() {\n}\n", "fn g() {}"]),
    "carriage returns": (
        "@d\r\nint f()\r\n{\r\n  a\r\n\r\n}\r\ng\r\n",
        ["@d\r\nint f()\r\n{\r\n  a\r\n\r\n}\r\n", "  a\r\n\r\n", "g\r\n"],
    ),
    "paragraphs that wide blanks indent": (
        "\u3000\u3000海是蓝色的。\n\u3000\u3000天空",
        ["\u3000\u3000海是蓝色的。\n", "\u3000\u3000天空"],
    ),
    "a decorator at the end": ("x\n@d", ["x\n", "@d"]),
    "prose that begins as code": ("endless\nelsewhere", ["endless\n", "elsewhere"]),
    "blank": (" \n\n", []),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_statements_of(text: str, expected: list[str]):
    assert [text[start:end] for start, end in zip(*statements(text), strict=True)] == expected


@given(st.lists(st.sampled_from(["x", "  y", "\tz", "}", "else:", "@d", "```", "", "    (", "  )"]), max_size=20))
def test_statements_nest_and_begin_with_lines(lines: list[str]):
    text = "\n".join(lines)
    starts, ends = statements(text)

    assert starts == sorted(set(starts))
    assert bool(starts) == bool(text.strip())
    for start, end in zip(starts, ends, strict=True):
        assert text[start:end].strip()
        assert start == 0 or text[start - 1] == "\n"
        assert all(other >= end or ends[starts.index(other)] <= end for other in starts if other >= start)
