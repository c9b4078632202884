"""Definitions in Python code, and in text that holds code without marking it, as some replies do.

A definition is an import, function, class or constant: it runs no part of the program.
"""

import ast
import re
from codeop import PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]
from collections.abc import Collection, Sequence

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CONSTRUCTORS = {"float", "int", "set", "dict", "list", "tuple", "range", "pow", "defaultdict", "Counter", "deque"}
START = re.compile(r"[ \t]*(?:@\w|(?:async[ \t]+)?def[ \t]|class[ \t]|import[ \t]|from[ \t]|\w[^=\n]*=)")
BLOCK = re.compile(r"[ \t]*(?:async|def|class|if|elif|else|for|while|with|try|except|finally|match|case)\b")
PROMPTED = re.compile(r"[ \t]*(?:>>>|\.\.\.)(?: (.*))?")
MOST_MARGINS = 20  # lines within one statement that are not indented: of brackets and strings
MOST_PARSED = 20
"""How many times the characters of a text are parsed. Prose and code need a few, endless open brackets any number."""


def tree_of(code: str) -> ast.Module | None:
    """The syntax tree; None unless the code is valid Python."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, deep nesting
        return None


def parses(code: str) -> bool:
    """Whether the code is valid Python."""
    return tree_of(code) is not None


def solves(code: str, names: Collection[str]) -> bool:
    """Whether code is valid Python that defines a function, class or variable of one of these names."""
    tree = tree_of(code)
    return tree is not None and any(name in names for statement in tree.body for name in _names_of(statement))


def attempt(code: str, names: Collection[str]) -> str | None:
    """Code that need not be valid, from the first line at the left margin that defines one of these names."""
    either = "|".join(map(re.escape, names)) or r"\Z\A"
    line = rf"^(?:(?:(?:async[ \t]+)?def|class)[ \t]+(?:{either})\b|(?:{either})[ \t]*(?::[^=\n]+)?=[^=])"
    found = re.search(line, code, re.MULTILINE)
    return code[found.start() :] if found else None


def _names_of(statement: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) and statement.value else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


def only_defines(code: str) -> bool:
    """Whether code is valid Python that consists of definitions."""
    tree = tree_of(code)
    return tree is not None and all(map(_is_definition, tree.body))


def _is_definition(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
        return all(isinstance(call, ast.Name) and call.id in CONSTRUCTORS for call in calls)
    return isinstance(statement, DEFINITIONS)


def definitions_in(text: str) -> list[tuple[str, int]]:
    """Pieces of code in a text of prose and code, with the index of the line after each.

    A piece is a run of definitions, without their common indentation.

    Only complete definitions count: the next line, if there is one, is not indented further than the definition begins.
    So a function is not taken up to the line from which it is invalid. A definition inside another one that is invalid
    is not taken either. Prose, and statements that run something, end a piece; blank lines and comments do not.
    The search ends where the text would have to be parsed more than MOST_PARSED times.
    """
    lines, pieces, ends = text.split("\n"), list[str](), list[int]()
    outer = _outer_lines(lines)
    margin, i, parsed = -1, 0, 0  # margin: of the piece that may go on, or -1
    while i < len(lines):
        end, characters = _end_of_definition(lines, i, outer[i])
        parsed += characters
        if parsed > MOST_PARSED * (len(text) + 1000):
            break
        if end is None:
            margin = margin if not lines[i].strip() or lines[i].lstrip().startswith("#") else -1
            i += 1
            continue
        code = _without_indent(lines[i:end])
        if margin == _indent(lines[i]):
            pieces[-1] += code
            ends[-1] = end
        else:
            pieces.append(code)
            ends.append(end)
        margin, i = _indent(lines[i]), end
    return [(piece.rstrip() + "\n", end) for piece, end in zip(pieces, ends, strict=True)]


def typed(text: str) -> str:
    """What was typed at Python's prompts (`>>> ` and `... `) in a session, without the output."""
    return "".join(f"{found[1] or ''}\n" for line in text.split("\n") if (found := PROMPTED.fullmatch(line)))


def _end_of_definition(lines: Sequence[str], start: int, outer: str) -> tuple[int | None, int]:
    """The line after the definition that begins on this line, and how many characters were parsed to find it.

    None if none begins, or it is not complete. outer: the line that the first one is indented under.
    """
    parsed, margins = 0, 0
    if not START.match(lines[start]) or BLOCK.match(outer):
        return None, parsed
    for end in range(start + 1, len(lines) + 1):
        if end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > _indent(lines[start])):
            continue
        code = _without_indent(lines[start:end])
        parsed += len(code)
        if not is_incomplete(code):
            return end if only_defines(code) else None, parsed
        margins += 1
        if margins > MOST_MARGINS:
            break
    return None, parsed


def _outer_lines(lines: Sequence[str]) -> list[str]:
    """For each line the one that it is indented under, or an empty one."""
    above, outer = list[str](), list[str]()
    for line in lines:
        while line.strip() and above and _indent(above[-1]) >= _indent(line):
            above.pop()
        outer.append(above[-1] if above else "")
        above += [line] if line.strip() else []
    return outer


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _without_indent(lines: Sequence[str]) -> str:
    """The lines as code, without the indentation of the first one."""
    indent = lines[0][: _indent(lines[0])]
    return "".join(line.removeprefix(indent) + "\n" for line in lines)


def is_incomplete(code: str) -> bool:
    """Whether further lines may make the code valid: a block, bracket, string or decorator is open at its end."""
    try:
        compile(code, "", "exec", ast.PyCF_ONLY_AST | PyCF_ALLOW_INCOMPLETE_INPUT)
    except SyntaxError as error:
        return "incomplete input" in str(error)
    except (ValueError, RecursionError, MemoryError):
        pass
    return False
