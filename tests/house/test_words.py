"""The language stays plain: documents, docstrings, comments, messages and names of tests avoid these words.

Each entry has the words to use instead. Add a word when the repository is free of it.
"""

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTEAD = {  # case-sensitive, so that `is None` is not `is none`
    r"[Gg]oes on\b": "continues, resumes",
    r"\bgo on (?:from|where|with)\b": "continue, resume",
    r"\bgone on with\b": "continued, resumed",
    r"\b[Ff]oresees?\b": "predict",
    r"\bleads? nowhere\b": "what is wrong, and the allowed values",
    r"(?<!here\s)\bis none\b(?! of\b)": "is missing; is not a ...",
    r"(?<!here\s)\bis no (?!longer\b|more\b|less\b|\d)[a-z]+\b": "is not a ...",
    r"\b[Aa]new\b": "again; newly",
    r"\bof (?:its|their|his) own\b(?!\s[a-z])": "separate",
    r"\b[Aa]like\b": "equal; similar",
    r"\bso many\b": "n; this many",
    r"\b[Ll]ikeliest\b": "most likely",
    r"\bLetters:": "Shapes:",
    r"\brunning average\b": "EMA",
    r"\b[Ww]hoever\b": "the process, the reader ...",
    r"\b[Mm]end(?:s|ed|ing)?\b": "repair, correct",
    r"\bsays so\b": "reports it",
    r"\b(?:nats|floats|bytes|replies|microbatches|layers|futures) an? (?=\w)": "per",
    r"\b(?:in|into) (?:its|their) turn\b": "one after the other",
    r"\bleft away\b": "dropped",
    r"\bcrew\b": "pool",
    r"\b(?:jail|cage)\b": "sandbox",
    r"\b[Bb]ad rows?\b": "bad record",
    r"\brows? of (?:the|an|a) (?:input|file|chat|conversation|JSONL|prompt)\w*": "record",
    r"\b(?:train|validation|chat|JSONL) rows?\b": "record",
    r"\bpacked rows?\b": "packed sequence",
    r"\btarget rows?\b": "target, embedding",
}
SPACE = r"\s+(?:#\s*)?"  # a phrase may be broken over two lines
PATTERN = re.compile("|".join(f"(?P<w{i}>{word.replace(' ', SPACE)})" for i, word in enumerate(INSTEAD)))
NOT_PROSE = ("tests/house/test_words.py", "megatron_sfr/demo/language.py")
"""The list itself, and the demo's language, whose words are data."""


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of the parts of a file that people read."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, text
        return
    comments: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.STRING, tokenize.FSTRING_MIDDLE):
                yield token.start[0], token.string
            elif token.type == tokenize.NAME and token.string.startswith("test_"):
                yield token.start[0], token.string.replace("_", " ")
            elif token.type == tokenize.COMMENT:
                comments.append((token.start[0], token.string))
    yield from comments


def findings(path: Path, name: str) -> list[str]:
    """Each listed word in a file as `file:line: word: instead`."""
    found = []
    for first, text in prose(path):
        for match in PATTERN.finditer(text):
            instead = list(INSTEAD.values())[int((match.lastgroup or "w0")[1:])]
            line = first + text.count("\n", 0, match.start())
            found.append(f"{name}:{line}: {' '.join(match[0].split())!r}: write {instead}")
    return found


def files() -> Iterator[tuple[Path, str]]:
    kinds = ("*.py", "*.md", "*.yaml", "*.sh", "*.sbatch", "*.ipynb")
    for folder in ("megatron_sfr", "tools", "tests", "docs", "examples", "launch"):
        for path in sorted(path for kind in kinds for path in (ROOT / folder).rglob(kind)):
            yield path, path.relative_to(ROOT).as_posix()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "setup.py"):
        yield ROOT / name, name


def test_the_listed_words_are_not_used() -> None:
    found = [line for path, name in files() if not name.startswith(NOT_PROSE) for line in findings(path, name)]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('"""A vector.\n\nA second call goes on."""\n', 3, "goes on"),
        ("x = 1  # a list of its own\n", 1, "of its own"),
        ('def f():\n    raise ValueError(f"{x} is no folder")\n', 2, "is no folder"),
        ("def test_a_killed_run_goes_on():\n    pass\n", 1, "goes on"),
    ],
)
def test_a_listed_word_is_found_with_its_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    (tmp_path / "a.py").write_text(text)
    (found,) = findings(tmp_path / "a.py", "a.py")
    assert found.startswith(f"a.py:{line}: {word!r}: write ")


def test_plain_words_are_not_found(tmp_path: Path) -> None:
    text = '"""There is no file, the tensor is None, and a run is no longer there."""\nx = None if y is None else y\n'
    (tmp_path / "a.py").write_text(text)
    assert findings(tmp_path / "a.py", "a.py") == []
