"""Extracts the solution from a reply of a chat or base model: one of its blocks of code, or code in its prose."""

import html
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from megatron_sfr.evaluation.code.definitions import (
    attempt,
    definitions_in,
    is_incomplete,
    only_defines,
    parses,
    solves,
    typed,
)
from megatron_sfr.evaluation.generate.thinking import without_thoughts

OPENING = re.compile(r"(?P<indent>[ \t]*+)(?:(?:[-*+>]|\d+[.)])[ \t]*+)?(?P<fence>`{3,}|~{3,})(?P<info>.*)")
QUOTED = re.compile(r"(?:^ {0,3}>.*\n?)+", re.MULTILINE)  # a block quote
PYTHON = re.compile(r"[^\w]*(?:python|py)[\d.]*(?![\w-])|\S+\.py\b", re.IGNORECASE)  # not python-repl, pycon
TAGS = (
    (r"\[PYTHON\]", r"\[/PYTHON\]"),
    (r"\[BEGIN\]", r"\[DONE\]"),
    (r"<python>", r"</python>"),
    (r"(?:<pre\b[^>\n]*>\s*)?<code\b[^>\n]*>", r"</code>"),
    (r"<pre\b[^>\n]*>", r"</pre>"),
    (r"\\begin\{(?:python|code|lstlisting|minted|verbatim)\}(?:\[[^\]\n]*\]|\{\w+\})*", r"\\end\{\w+\}"),
)
"""Around code without a fence: of CodeLlama, of MBPP's prompts, of XML and HTML, of LaTeX."""
MOST_ENDS = 4  # fences that may close a block, the others being in its docstrings
MOST_QUOTES = 8  # block quotes in block quotes
BARE = re.compile(r"<|&(?!#?\w+;)")  # what HTML has to escape
CONTROL = re.compile(r"\A\s*(?:<\|\w+\|>\s*)+|(?<!\s)(?:\s*(?:<\|\w+\|>|</s>|<end_of_turn>))+\s*\Z")
"""Control tokens around a reply, which some servers leave there."""


@dataclass(frozen=True)
class Block:
    """A block of code. is_python: whether its language is Python; None without a language. is_closed: by a fence."""

    code: str
    is_python: bool | None
    is_closed: bool = True


def extract_code(reply: str, defines: Collection[str] = (), prompt: str = "") -> str:
    """The solution in a reply.

    Thoughts (`<think>...</think>`) are dropped. In a reply without fences, valid code between TAGS is a block. The
    solution is the last block that defines one of the given names; else the beginning of the text, if it completes the
    prompt; else the last run of definitions in the text that defines one of the names; else the last block in Python;
    else the last block without a language; else the complete reply. Earlier blocks, or runs, with only imports and
    definitions are put before it.

    Args:
        reply: The model's text.
        defines: Names of which the solution defines one; empty for a program of standard input and output.
        prompt: Code that the reply may complete.
    """
    text = _unquoted(without_thoughts(reply).replace("\r\n", "\n").replace("\r", "\n"))
    completes = prompt and text.lstrip("\n")[:1] in " \t" and text.strip()
    marked = "~~~" in text or any(re.search(rf"(?i)\A\s*{a}|{b}\s*\Z", text) for a, b in TAGS)
    if completes and parses(prompt + text):
        return text  # its fences and tags are in strings
    if not marked and parses(text) and (not defines or solves(text, defines)):  # ~~~x and [x] are expressions
        return text
    text = CONTROL.sub("\n", text)
    if not _fences(text):
        text = _fenced(text)
    blocks = [_without_prose(block, defines) for block in _blocks(text)]
    blocks = [block for block in blocks if block.is_python is not False or solves(block.code, defines)]
    if wanted := [block for block in blocks if attempt(block.code, defines)]:
        last = wanted[-1] if wanted[-1].is_closed or parses(wanted[-1].code) else wanted[-2:][0]  # else it is cut off
        return _with_definitions(blocks, last, defines)
    if solution := (completes and _beginning(text, prompt)) or _in_prose(text, defines):
        return solution
    if named := [block for block in blocks if block.is_python]:
        return _with_definitions(blocks, named[-1], defines)
    unnamed = [block for block in blocks if parses(block.code)] or blocks
    return unnamed[-1].code if unnamed else text


def _without_prose(block: Block, defines: Collection[str]) -> Block:
    """The block, of whose code only definitions are kept if it is not valid but has the solution."""
    return block if parses(block.code) else replace(block, code=_in_prose(block.code, defines) or block.code)


def _in_prose(text: str, defines: Collection[str]) -> str | None:
    """The last run of definitions in a text, or in a session with Python in it, that defines one of the names.

    None if a definition that is not valid follows, unless the end of the text cuts it off.
    """
    for prose in (text, typed(text)):
        found = definitions_in(prose)
        pieces = [Block(code, True) for code, _ in found]
        if wanted := [i for i, piece in enumerate(pieces) if solves(piece.code, defines)]:
            rest = prose.split("\n")[found[wanted[-1]][1] :]
            later = attempt("\n".join(rest), defines)
            is_last = later is None or is_incomplete(later.rstrip("\n"))
            return _with_definitions(pieces, pieces[wanted[-1]], defines) if is_last else None
    return None


def _beginning(text: str, prompt: str) -> str | None:
    """The first lines of a text that complete the prompt, up to a line that is not indented, or a fence."""
    lines = text.split("\n")
    for end in range(1, len(lines) + 1):
        if end == len(lines) or lines[end][:1].strip() or _opens(lines[end]):
            beginning = "".join(f"{line}\n" for line in lines[:end])
            if beginning.strip() and parses(prompt + beginning):
                return beginning
    return None


def _with_definitions(blocks: Sequence[Block], chosen: Block, defines: Collection[str]) -> str:
    """The chosen block, preceded by earlier blocks that only import and define, except drafts of the solution."""
    if not parses(chosen.code):  # for example the body of a function
        return chosen.code
    earlier = [block.code for block in blocks[: blocks.index(chosen)] if only_defines(block.code)]
    return "".join(code for code in earlier if not solves(code, defines)) + chosen.code


def _fenced(text: str) -> str:
    """The text with valid code between TAGS in fences. The prompt may have written the opening tag."""

    def block(found: re.Match[str]) -> str:
        code = found[1].strip("\n")
        if found[0].lstrip()[:1] == "<" and not BARE.search(code):
            code = html.unescape(code)
        return f"\n```python\n{code}\n```\n" if code and parses(textwrap.dedent(code)) else found[0]

    for opening, closing in TAGS:
        if re.search(opening, text, re.IGNORECASE):  # a reply that is cut off has no closing tag
            start, end = rf"(?:^[ \t]*{opening}|{opening}[ \t]*$)", rf"(?:{closing}|\Z)"
        else:
            start, end = r"\A", closing
        text = re.sub(f"{start}(.*?){end}", block, text, flags=re.DOTALL | re.MULTILINE | re.IGNORECASE)
    return text


def _unquoted(text: str, depth: int = 0) -> str:
    """The text without the `>` of block quotes that hold a fence, at a depth of at most MOST_QUOTES."""
    if depth == MOST_QUOTES:
        return text

    def without_marks(quote: re.Match[str]) -> str:
        inner = re.sub(r"^ {0,3}> ?", "", quote[0], flags=re.MULTILINE)
        return _unquoted(inner, depth + 1) if any(_opens(line.lstrip("> ")) for line in inner.split("\n")) else quote[0]

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
        ends = list(islice((j for j in range(i, len(lines)) if close.fullmatch(lines[j])), MOST_ENDS)) or [len(lines)]
        info = found["info"].strip()
        if not info and i < len(lines) and lines[i].strip().lower() in ("python", "python3"):
            info, i = lines[i].strip(), i + 1  # the language on a line below the fence
        is_python = bool(PYTHON.match(info)) if info else None
        codes = [_unindented(lines[i:end], found["indent"]) for end in ends[: 1 if is_python is False else None]]
        whole = next((j for j, code in enumerate(codes) if parses(code)), 0)
        yield Block(codes[whole], is_python, ends[whole] < len(lines))
        i = ends[whole] + 1


def _unindented(lines: Sequence[str], indent: str) -> str:
    """Lines of a block without the indentation of its fence, or any other that makes a module invalid."""
    code = "".join(line.removeprefix(indent) + "\n" for line in lines)
    flush = textwrap.dedent(code)
    is_module = re.match(r"\s*(?:@|def |async def |class |import |from )", flush)
    return flush if is_module and not parses(code) and parses(flush) else code
