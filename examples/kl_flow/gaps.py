"""Held-out text for the measurement: sequences of tokens, and functions from which a few lines are removed."""

import ast
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SHORTEST, LONGEST = 4, 32  # tokens of a gap


@dataclass(frozen=True)
class Gap:
    """A sequence of tokens that ends with a function, whose lines at [start, stop) are to be filled in."""

    tokens: tuple[int, ...]
    start: int
    stop: int
    function: int
    """Index of the function's first token. The tokens before it are those before it in its module."""
    nested: bool
    """Whether the function is indented."""

    def filled(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The function with these tokens in the gap."""
        return (*self.tokens[self.function : self.start], *tokens, *self.tokens[self.stop :])


def is_python(source: str, nested: bool) -> bool:
    """Whether a function's source, indented (nested) or not, is one statement that Python's compiler accepts.

    It is not run. The parser alone would let a line end the function too early.
    """
    whole = "if True:" + source if nested else source
    try:
        with warnings.catch_warnings(action="ignore"):  # the compiler's doubts about a style
            compile(tree := ast.parse(whole), "<gap>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character
        return False
    return len(tree.body) == 1


def text_rows(modules: Sequence[str], tokenizer: Any, length: int, count: int) -> list[tuple[int, ...]]:
    """`count` sequences of `length` tokens from the modules, as in training: each module ends with an end token."""
    tokens: list[int] = []
    for module in modules:
        tokens += [*tokenizer(module, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = [tuple(tokens[i : i + length]) for i in range(0, len(tokens) - length, length)]
    if len(rows) < count:
        raise ValueError(f"the held-out text has {len(rows)} times {length} tokens, not {count}; ask for fewer texts")
    return random.Random(0).sample(rows, count)


def gaps(modules: Sequence[str], tokenizer: Any, length: int, count: int) -> list[Gap]:
    """`count` functions with one gap each, drawn with seed 0: a statement's whole lines, of SHORTEST to LONGEST tokens.

    A sequence has `length` tokens. Functions that are longer, or begin too early in their module to fill the sequence,
    are not used, nor are functions inside functions.
    """
    found = [gap for i, module in enumerate(modules) for gap in _of_module(module, tokenizer, length, i)]
    if len(found) < count:
        raise ValueError(f"the held-out text has {len(found)} such functions, not {count}; ask for fewer gaps")
    return random.Random(0).sample(found, count)


def _of_module(source: str, tokenizer: Any, length: int, seed: int) -> Iterator[Gap]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    encoded = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
    place = {begin: i for i, (begin, _) in enumerate(encoded["offset_mapping"])}
    place[len(source.rstrip())] = place.get(len(source.rstrip()), len(place))
    cuts = _cuts(source)
    draw = random.Random(seed)
    for function in _functions(tree):
        assert function.end_lineno is not None
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        head, tail = (place.get(cuts[line]) for line in (first - 1, function.end_lineno))
        if head is None or tail is None or not 0 <= tail - length <= head:
            continue
        spans = sorted({_lines(s) for body in _bodies(function) for s in body if not _says(s)})
        found = [(place.get(cuts[a - 1]), place.get(cuts[b])) for a, b in spans]
        fit = [(a, b) for a, b in found if a is not None and b is not None and SHORTEST <= b - a <= LONGEST]
        if fit:
            begin = tail - length
            start, stop = draw.choice(fit)
            row = tuple(encoded["input_ids"][begin:tail])
            yield Gap(row, start - begin, stop - begin, head - begin, function.col_offset > 0)


def _cuts(source: str) -> list[int]:
    """Offsets at which each line may be cut: after the last visible character before it. Byte-level BPE with GPT-2's
    pattern begins a token there, so the parts have the same tokens as the whole."""
    lines = source.splitlines(keepends=True)
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    return [len(source[:end].rstrip()) for end in ends]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from _functions(node)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for inner in ast.walk(node):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(inner, name, None), list):
                yield body


def _lines(statement: ast.stmt) -> tuple[int, int]:
    assert statement.end_lineno is not None
    return statement.lineno, statement.end_lineno


def _says(statement: ast.stmt) -> bool:
    """Whether a statement is only a constant, such as a docstring, where any text would be valid."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
