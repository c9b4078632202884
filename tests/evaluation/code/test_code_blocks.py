"""The solution in a reply, as chat models and base models write them."""

import pytest

from megatron_sfr.evaluation.code.code_blocks import extract_code
from megatron_sfr.evaluation.code.definitions import definitions_in
from megatron_sfr.evaluation.generate.thinking import without_empty_thought, without_thoughts

ADD = "def add(a, b):\n    return a + b\n"
DRAFT = "def add(a, b):\n    return a - b\n"
PROMPT = 'def add(a, b):\n    """Add."""\n'


def fenced(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}{fence}\n"


@pytest.mark.parametrize(
    "reply",
    [
        ADD,
        fenced(ADD),
        "Sure!\n\n" + fenced(ADD, "Python") + "Done.",
        *(
            fenced(ADD, info)
            for info in ("", "PY", "python3", "Python3.12", " python", "{.python}", 'python title="a.py"')
        ),
        fenced(ADD, fence="~~~"),
        fenced(ADD, "", fence="````"),
        fenced(ADD).replace("\n", "\r\n"),
        f"```python\n{ADD}",  # cut off
        f"~~~python\n{ADD}",
        fenced("pip install x\n", "bash") + fenced(ADD),
        fenced("print(add(1, 2))\n") + fenced(ADD),
        fenced(ADD) + fenced("print(add(1, 2))\n"),
        fenced(ADD) + "Output:\n" + fenced("3\n", ""),
        fenced(ADD) + fenced("fn add() {}\n", "rust"),
        fenced(DRAFT) + "Wrong. Again:\n" + fenced(ADD),
        fenced(ADD, "") + fenced("print(1)\n"),  # it defines the function
        f"<think>maybe\n{fenced(DRAFT)}no</think>\n{fenced(ADD)}",
        f"[THINK]maybe\n{fenced(DRAFT)}no[/THINK]{fenced(ADD)}",
        f"<seed:think>{fenced(DRAFT)}no</seed:think>{fenced(ADD)}<seed:think>{fenced(DRAFT)}",
        f"maybe\n{fenced(DRAFT)}no</think>\n\n{fenced(ADD)}",  # the prompt had opened the thought
        f"<think>a</think>{fenced(ADD)}<think>{fenced(DRAFT)}",
        "1. First:\n   " + fenced(ADD).replace("\n", "\n   "),
        "- " + fenced(ADD).replace("\n", "\n  "),
        "As you asked:\n" + "".join(f"> {line}\n" for line in fenced(ADD).splitlines()) + "Done.",
        "".join(f"> > {line}\n" for line in fenced(ADD).splitlines()) + "\n> Done.",
        "> Do it:\n>\n" + "".join(f"> {line}\n" for line in fenced(ADD, fence="~~~").splitlines()),
        "> Write `add`.\n\n" + fenced(ADD),
        fenced("    " + ADD.replace("\n", "\n    ").rstrip(" ")),
        fenced(">>> add(1, 2)\n3\n", "python-repl") + fenced(ADD),
        fenced(ADD, "add.py"),
        fenced(ADD, "code"),
        fenced("python\n" + ADD, ""),
        f"[PYTHON]\n{ADD}[/PYTHON]",
        f"Sure:\n\n[PYTHON]\n{DRAFT}[/PYTHON]\nNo.\n[PYTHON]\n{ADD}[/PYTHON]\n[TESTS]\nassert add(1, 2) == 3\n[/TESTS]",
        f"[PYTHON]\n{fenced(ADD)}[/PYTHON]",
        f"[PYTHON]\n{ADD}",  # cut off
        f"[BEGIN]\n{ADD}[DONE]\n",
        f"{ADD}[DONE]\n\nNow write a function that",  # the prompt had opened the tag
        f"So:\n<code>\n{ADD}</code>\nDone.",
        f"<python>{ADD}</python>",
        f"Sure. [PYTHON]\n{ADD}[/PYTHON] Done.",
        f"[python]\n{ADD}[/python]",
        f'So:\n<pre><code class="language-python">{ADD}</code></pre>\nDone.',
        f"<pre>\n{ADD}</pre>",
        f"\\begin{{python}}\n{ADD}\\end{{python}}\nDone.",
        f"So:\n\\begin{{lstlisting}}[language=Python]\n{ADD}\\end{{lstlisting}}",
        f"\\begin{{minted}}{{python}}\n{ADD}\\end{{minted}}",
        f"Here is the code:\n\n{ADD}\nThis adds the numbers.",
        "To add them:\n\n    " + ADD.replace("\n", "\n    ") + "\n\nThis adds the numbers.",
        f"<solution>\n{ADD}</solution>",
        f"```python\n{ADD}\nThis adds the numbers.",  # the fence is not closed
        f"{ADD}```\nThis adds the numbers.",  # it was opened in the prompt
        f"Here: ```python\n{ADD}```",
        fenced(DRAFT) + f"Wrong. Again:\n```python\n{ADD}\nThis adds the numbers.",
        fenced(ADD) + f"Or with a lambda:\n```python\n{ADD}    return (lambda: a +",  # cut off
        f"First:\n\n{DRAFT}\nWrong. Again:\n\n{ADD}\nprint(add(1, 2))\n\nDone.",
        fenced(">>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n", "pycon"),
        ">>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n",
        "'''python\n" + ADD + "'''",
        f"{ADD}<|im_end|>\n",
        fenced(ADD).rstrip() + "<|im_end|>",
        f"<|python_tag|>{ADD}<|eom_id|>",
    ],
)
def test_the_block_that_defines_the_function_is_found(reply: str) -> None:
    for prompt in (PROMPT, ""):  # MBPP: nothing to continue
        assert extract_code(reply, ("add",), prompt).rstrip() == ADD.rstrip()


def test_imports_and_definitions_of_earlier_blocks_stay_with_it() -> None:
    needed = "import math\nLIMIT = float('inf')\n", "def helper():\n    return 1\n"
    reply = fenced(needed[0]) + fenced("x = add(1, 2)\n") + fenced(DRAFT) + fenced(needed[1]) + fenced(ADD)
    assert extract_code(reply, ("add",)) == "".join(needed) + ADD


def test_in_prose_they_stay_with_it_too():
    needed = 'import math\n\n\ndef helper(\n    x,\n):\n    """Help.\n\n1. Return it.\n"""\n    return x\n'
    code = f"{needed}\n# The solution\n@helper\n{ADD}"
    assert extract_code(f"It needs a helper:\n\n{code}\nprint(add(1, 2))\n\nDone.", ("add",)) == code.replace(
        "# The solution\n", ""
    )
    parts = f"First import.\n\nimport math\n\nThen:\n\nLIMIT = 3\n\nThen:\n\n{DRAFT}\nNo:\n\n{ADD}\nDone."
    assert extract_code(parts, ("add",)) == f"import math\nLIMIT = 3\n{ADD}"


@pytest.mark.parametrize(
    "reply",
    [
        "It is:\n\ndef add(a, b):\n    if a:\n        return a + b\n    retu rn b\n\nDone.",  # valid up to there
        "It is:\n\ndef add(a, b):\n    if a:\n        return a + b\n    return (b +",  # cut off
        "It is:\n\ndef outer(x):\n    def add(a, b):\n        return a + b\n\n    retu rn add\n",
        "It is:\n\nclass Adder\n    def add(a, b):\n        return a + b\n",
        "It is:\n\nif True\n    def add(a, b):\n        return a + b\n",
        f"It is:\n\n{ADD}\nNo:\n\ndef add(a, b):\n    retu rn a + b\n\nDone.",  # the last one is the solution
        "In Ruby:\n\ndef add(a, b)\n    a + b\nend\n",
        "Call `add = sum` or so. The function is def add(a, b): return a + b in short.",
        "add = make_adder(2)\nThis is the function.",
    ],
)
def test_code_that_is_cut_off_invalid_or_inside_other_code_is_not_a_solution(reply: str) -> None:
    after_draft = fenced(ADD) + fenced(f"{reply}\n") if "\ndef add(a, b):\n" in reply else reply
    for text in (reply, fenced(f"{reply}\n"), after_draft):
        code = extract_code(text, ("add",))
        assert code.strip() in text
        with pytest.raises(SyntaxError):
            compile(code, "", "exec")


def test_html_in_a_block_is_read_as_html_only_if_all_of_it_is_escaped() -> None:
    code = "def add(a, b):\n    return b + a if a &lt; b &amp;&amp; 1 else a + b\n".replace(" &amp;&amp; 1", "")
    assert extract_code(f"<pre><code>{code}</code></pre>", ("add",)) == code.replace("&lt;", "<")
    code = "def add(a, b):\n    return a.replace('<', '&lt;')\n"
    assert extract_code(f"<pre><code>{code}</code></pre>", ("add",)) == code


@pytest.mark.parametrize("line", ["def add(\n", "x = '''\n", "import math\n", "def add(a, b):\n", "x = [\n1,\n"])
def test_a_reply_that_repeats_itself_takes_no_time(line: str) -> None:
    assert extract_code("It is:\n" + 500 * line + "so.", ("add",))


def test_the_search_for_definitions_ends_in_brackets_without_end() -> None:
    """Each line could begin a definition of all that follows."""
    deeper = "".join(f"{' ' * i}x = [\n" for i in range(100))
    assert [code for code, _ in definitions_in(ADD + deeper + "\n" + ADD)] == [ADD]


def test_a_blank_line_does_not_end_an_invalid_block() -> None:
    invalid = 'class Foo:\n    x = (1\n    def bar(self): print "x"\n\n    def add(self, a, b):\n        return a - b\n'
    assert extract_code(f"{ADD}\nOr:\n\n{invalid}", ("add",)) == ADD


def test_a_block_may_be_quoted_any_number_of_times() -> None:
    assert ADD in extract_code("".join(f"> > > {line}\n" for line in fenced(ADD).split("\n")), ("add",))
    assert extract_code(">" * 2000 + "```\n")


def test_a_program_is_the_last_block_in_python() -> None:
    program = "print(int(input()) + 1)\n"
    assert extract_code(fenced(ADD) + fenced(program) + fenced("2\n", "") + fenced("run\n", "sh")) == ADD + program
    assert extract_code(fenced("$ run\n", "") + fenced(program, "") + fenced("out put\n", "")) == program


def test_a_docstring_may_hold_fences() -> None:
    code = 'def add(a, b):\n    """Add.\n\n```\nadd(1, 2)\n```\n"""\n    return a + b\n'
    assert extract_code("So:\n" + fenced(code) + "Done.", ("add",)) == code
    assert extract_code(code, ("add",)) == code


def test_tags_in_the_code_are_code() -> None:
    for line in ("x = '[DONE]'\n", "# [PYTHON]\n", '"""\n<code>\nx\n</code>\n"""\n'):
        assert extract_code(ADD + line, ("add",)) == ADD + line
        assert extract_code("So:\n" + fenced(ADD + line) + "Done.", ("add",)) == ADD + line
        assert extract_code(f"    {line}", ("add",), PROMPT) == f"    {line}"


@pytest.mark.parametrize("body", ["    return a + b\n", "\n    c = a + b\n    return c\n"])
def test_a_reply_may_continue_the_prompt(body: str) -> None:
    assert extract_code(body, ("add",), PROMPT) == body
    assert extract_code(f"{body}```\n\nThis adds.\n", ("add",), PROMPT) == body  # the prompt had opened a fence
    assert extract_code(f"{body}\nThis adds the numbers.", ("add",), PROMPT).rstrip() == body.rstrip()
    assert extract_code(f"{body}\n\ndef test():\n    assert add(1, 2) == (", ("add",), PROMPT).rstrip() == body.rstrip()
    assert extract_code(f"{body}<|endoftext|>", ("add",), PROMPT).rstrip() == body.rstrip()
    assert extract_code("Here:\n" + fenced(body), ("add",), PROMPT) == body
    assert extract_code(f"[PYTHON]\n{body}[/PYTHON]\nDone.", ("add",), PROMPT).strip("\n") == body.strip("\n")
    assert extract_code("<think>\n\n</think>\n\n    return 1", ("add",), PROMPT) == "    return 1"


def test_without_a_fence_the_reply_is_the_code() -> None:
    assert extract_code("I cannot.", ("add",), PROMPT) == "I cannot."
    assert extract_code(f"<think>{fenced(ADD)}", ("add",)) == ""


def test_empty_thoughts_are_dropped_from_the_start_of_a_reply() -> None:
    for empty in ("<think>\n\n</think>\n\n", "<think></think>", "\n</think>\n\n"):
        assert without_empty_thought(f"{empty}Hello </think>") == "Hello </think>"
    for kept in ("<think>\nso\n</think>\n\nHello", "Hello <think></think>", " Hello"):
        assert without_empty_thought(kept) == kept
    assert without_thoughts("<think>\nso\n</think>\n\nHello") == "Hello"
