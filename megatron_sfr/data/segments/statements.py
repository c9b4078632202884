"""Boundaries of statements in source code of any language, from lines and indentation alone."""

from __future__ import annotations

import re

CLAUSES = "else|elif|elsif|elseif|except|finally|catch|rescue|ensure|end|fi|done|esac"
LINE = re.compile(
    rf"""
    (?P<indent>[^\S\n]*)
    (?:
        (?P<fence>(?:```|~~~)[^`\n]*$)
      | (?P<continuing>[)\]}}]|\{{[^\S\n]*$|(?:{CLAUSES})\b)
      | (?P<leading>@[\w.]+(?:\(.*)?[^\S\n]*$|\#\[)
      | (?P<other>\S)
    )?
    [^\n]*\n?
    """,
    re.VERBOSE | re.MULTILINE,
)


def statements(text: str) -> tuple[list[int], list[int]]:
    """The index of the first character of each statement, ascending, and of the first one after it.

    A statement is a line with all lines that belong to it. It starts where a line that is not blank starts, and ends
    before the next such line that

    - has less indentation, or
    - has the same indentation and does not continue it. A line continues the last one of its indentation if it begins
      with a closing bracket, is a single opening brace, begins with else, elif, except, finally, catch, end or the
      like, or is the fence that closes a block of Markdown.

    Every other line starts a statement, within another one if it is indented more, except the line after a leading one:
    decorators (@name, @name(...), #[...]) and the fence that opens a block of Markdown are one statement with the next
    line of their indentation. So a function is a statement, and so is each line of its body, each element of a list on
    its own line, and outside code each line of prose. Tabs advance to the next multiple of 8. Nothing is parsed: the
    lines of a string, or of a preprocessor at column 0, count by their indentation as well.
    """
    starts: list[int] = []
    ends: list[int] = []
    stack: list[tuple[int, int]] = []  # (indentation, statement) of open statements, outermost first
    leading = -1  # the statement whose leading line waits for the next one
    fenced = False
    for line in LINE.finditer(text):
        kind = line.lastgroup
        if kind == "indent":
            continue  # blank
        indent = len(line["indent"].expandtabs())
        if kind == "fence":
            kind, fenced = "closing fence" if fenced else "leading", not fenced
        while stack and stack[-1][0] > indent:
            ends[stack.pop()[1]] = line.start()
        continues = kind in ("continuing", "closing fence") and bool(starts)
        if stack and stack[-1][0] == indent and not continues and stack[-1][1] != leading:
            ends[stack.pop()[1]] = line.start()
        joins = continues or bool(stack and stack[-1][0] == indent)
        if not joins:
            stack.append((indent, len(starts)))
            starts.append(line.start())
            ends.append(len(text))
        if kind == "leading":
            leading = stack[-1][1]
        elif (joins and kind == "other") or kind == "closing fence":
            leading = -1
    return starts, ends
