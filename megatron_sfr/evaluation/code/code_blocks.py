"""Extracts the solution from a reply of a chat or base model: one of its fenced blocks, or its text."""

import ast
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_sfr.evaluation.generate.thinking import without_thoughts

OPENING = re.compile(r"(?P<indent>[ \t]*)(?:[-*+>]|\d+[.)])?[ \t]*(?P<fence>`{3,}|~{3,})(?P<info>.*)")
QUOTED = re.compile(r"(?:^ {0,3}>.*\n?)+", re.MULTILINE)  # a block quote
PYTHON = re.compile(r"[^\w]*(?:python|py)[\d.]*(?![\w-])|\S+\.py\b", re.IGNORECASE)  # not python-repl, pycon
TAGS = (("[PYTHON]", "[/PYTHON]"), ("[BEGIN]", "[DONE]"), ("<python>", "</python>"), ("<code>", "</code>"))
"""Around code without a fence: of CodeLlama, of MBPP's prompts, of XML."""
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CONSTRUCTORS = {"float", "int", "set", "dict", "list", "tuple", "range", "pow", "defaultdict", "Counter", "deque"}


@dataclass(frozen=True)
class Block:
    """A fenced block. is_python: whether its language is Python; None without a language."""

    code: str
    is_python: bool | None


def extract_code(reply: str, defines: Collection[str] = (), prompt: str = "") -> str:
    """The solution in a reply.

    Thoughts (`<think>...</think>`) are dropped. In a reply without fences, valid code between TAGS is a block. The
    solution is the last block that defines one of the given names; else the text before the first fence, if it
    completes the prompt; else the last block in Python; else the last block without a language; else the complete
    reply. Earlier blocks with only imports and definitions are put before it.

    Args:
        reply: The model's text.
        defines: Names of which the solution defines one; empty for a program of standard input and output.
        prompt: Code that the reply may complete.
    """
    text = _unquoted(without_thoughts(reply).replace("\r\n", "\n").replace("\r", "\n"))
    completes = prompt and text.lstrip("\n")[:1] in " \t" and text.strip()
    marked = "~~~" in text or any(text.lstrip().startswith(a) or text.rstrip().endswith(b) for a, b in TAGS)
    if (completes and parses(prompt + text)) or (not marked and parses(text)):  # ~~~x and [x] are expressions
        return text  # its fences and tags are in strings
    if not _fences(text):
        text = _fenced(text)
    fences = _fences(text)
    if not fences:
        return text
    blocks = [block for block in _blocks(text) if block.is_python is not False or _is_solution(block.code, defines)]
    wanted = [block for block in blocks if any(_defines(block.code, name) for name in defines)]
    if wanted:
        return _with_definitions(blocks, wanted[-1], defines)
    before = "".join(line + "\n" for line in text.split("\n")[: fences[0]])
    if completes and before.strip() and parses(prompt + before):
        return before
    named = [block for block in blocks if block.is_python]
    if named:
        return _with_definitions(blocks, named[-1], defines)
    unnamed = [block for block in blocks if parses(block.code)] or blocks
    return unnamed[-1].code if unnamed else text


def parses(code: str) -> bool:
    """Whether the code is valid Python."""
    return _tree(code) is not None


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, deep nesting
        return None


def _defines(code: str, name: str) -> bool:
    """Whether code, valid or not, defines a function, class or variable of this name at the left margin."""
    return (
        re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=[^=]", code, re.M)
        is not None
    )


def _is_solution(code: str, defines: Collection[str]) -> bool:
    """Whether a block is valid Python that defines one of the names, whatever language it is labelled with."""
    return parses(code) and any(_defines(code, name) for name in defines)


def _with_definitions(blocks: Sequence[Block], chosen: Block, defines: Collection[str]) -> str:
    """The chosen block, preceded by earlier blocks that only import and define, except drafts of the solution."""
    if not parses(chosen.code):  # for example the body of a function
        return chosen.code
    earlier = [block.code for block in blocks[: blocks.index(chosen)] if _only_defines(block.code)]
    return "".join(code for code in earlier if not any(_defines(code, name) for name in defines)) + chosen.code


def _only_defines(code: str) -> bool:
    tree = _tree(code)
    return tree is not None and all(map(_is_definition, tree.body))


def _is_definition(statement: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class or a constant, which runs no part of the program."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
        return all(isinstance(call, ast.Name) and call.id in CONSTRUCTORS for call in calls)
    return isinstance(statement, DEFINITIONS)


def _fenced(text: str) -> str:
    """The text with valid code between TAGS in fences. The prompt may have written the opening tag."""

    def block(found: re.Match[str]) -> str:
        code = found[1].strip("\n")
        return f"\n```python\n{code}\n```\n" if code and parses(textwrap.dedent(code)) else found[0]

    for opening, closing in TAGS:
        if opening in text:  # a reply that is cut off has no closing tag
            start, end = rf"^[ \t]*{re.escape(opening)}", rf"(?:{re.escape(closing)}|\Z)"
        else:
            start, end = r"\A", re.escape(closing)
        text = re.sub(f"{start}(.*?){end}", block, text, flags=re.DOTALL | re.MULTILINE)
    return text


def _unquoted(text: str) -> str:
    """The text without the `>` of block quotes that hold a fence."""

    def without_marks(quote: re.Match[str]) -> str:
        inner = re.sub(r"^ {0,3}> ?", "", quote[0], flags=re.MULTILINE)
        return _unquoted(inner) if any(_opens(line.lstrip("> ")) for line in inner.split("\n")) else quote[0]

    return QUOTED.sub(without_marks, text)


def _opens(line: str) -> re.Match[str] | None:
    found = OPENING.fullmatch(line)
    return found if found and not (found["fence"][0] == "`" and "`" in found["info"]) else None


def _fences(text: str) -> list[int]:
    """Indices of the lines that open or close a block."""
    return [i for i, line in enumerate(text.split("\n")) if _opens(line)]


def _blocks(text: str) -> Iterator[Block]:
    """Fenced blocks as in CommonMark, including one that the end of the reply cuts off.

    In Python, a closing fence inside a docstring is skipped if only a later one gives valid code.
    """
    lines = text.removesuffix("\n").split("\n")
    i = 0
    while i < len(lines):
        found = _opens(lines[i])
        i += 1
        if not found:
            continue
        close = re.compile(rf"[ \t>]*{re.escape(found['fence'])}{re.escape(found['fence'][0])}*[ \t]*")
        ends = [j for j in range(i, len(lines)) if close.fullmatch(lines[j])] or [len(lines)]
        info = found["info"].strip()
        if not info and i < len(lines) and lines[i].strip().lower() in ("python", "python3"):
            info, i = lines[i].strip(), i + 1  # the language on a line below the fence
        is_python = bool(PYTHON.match(info)) if info else None
        codes = [_unindented(lines[i:end], found["indent"]) for end in ends[: 1 if is_python is False else 4]]
        whole = next((j for j, code in enumerate(codes) if parses(code)), 0)
        yield Block(codes[whole], is_python)
        i = ends[whole] + 1


def _unindented(lines: Sequence[str], indent: str) -> str:
    """Lines of a block without the indentation of its fence, or any other that makes a module invalid."""
    code = "".join(line.removeprefix(indent) + "\n" for line in lines)
    flush = textwrap.dedent(code)
    is_module = re.match(r"\s*(?:@|def |async def |class |import |from )", flush)
    return flush if is_module and not parses(code) and parses(flush) else code
