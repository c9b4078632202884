"""Every `megatron-sfr` command that a document shows is one that the parser takes, and every script it names exists."""

import argparse
import itertools
import re
import shlex
from pathlib import Path
from string import Template

import pytest

from megatron_sfr.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]


def commands(document: Path) -> list[str]:
    """The lines of shell blocks: continued ones joined, variables that the blocks set filled in."""
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    variables: dict[str, str] = {}
    lines = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if set_here := re.match(r"^(\w+)=(.*)$", line):
            variables[set_here[1]] = "".join(shlex.split(set_here[2], comments=True))
        lines.append(Template(line).safe_substitute(variables))
    return lines


def words(line: str) -> list[str]:
    """The words of the first command of a line, without what follows `>`, `|`, `&` or `;`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set(lexer.punctuation_chars), lexer))


SHOWN = [(path.relative_to(ROOT), line) for path in sorted(DOCUMENTS) for line in commands(path)]


def parse(arguments: list[str], shown: str) -> argparse.Namespace:
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(arguments)
    except SystemExit:
        pytest.fail(f"the parser refuses: {shown}")
    assert not rest or getattr(args, "passes_flags_on", False), f"unknown {rest} in: {shown}"
    return args


def test_documented_commands_parse() -> None:
    found = 0
    for path, line in SHOWN:
        command, *rest = words(line) or [""]
        if command.removeprefix(".venv/bin/") == "megatron-sfr":
            parse(rest, f"{path}: {line}")
            found += 1
    assert found > 10


def test_documented_files_exist() -> None:
    found = 0
    for path, line in SHOWN:
        for word in words(line):
            if re.match(r"(launch|tools|examples)/.*\.(sh|sbatch|py|yaml)$", word):
                assert (ROOT / word).is_file(), f"{path}: {line}"
                found += 1
    assert found > 3
