"""Every `megatron-sfr` command that a document shows is one that the parser takes, and every script it names exists."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron_sfr.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]


def commands(document: Path) -> list[str]:
    """The lines of shell blocks, continued ones joined."""
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


SHOWN = [(path.relative_to(ROOT), line) for path in sorted(DOCUMENTS) for line in commands(path)]


def parse(words: list[str], shown: str) -> argparse.Namespace:
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(words)
    except SystemExit:
        pytest.fail(f"the parser refuses: {shown}")
    assert not rest or getattr(args, "passes_flags_on", False), f"unknown {rest} in: {shown}"
    return args


def test_documented_commands_parse() -> None:
    found = 0
    for path, line in SHOWN:
        words = shlex.split(line, comments=True)
        if words and words[0].removeprefix(".venv/bin/") == "megatron-sfr":
            parse(words[1:], f"{path}: {line}")
            found += 1
    assert found > 10


def test_documented_files_exist() -> None:
    found = 0
    for path, line in SHOWN:
        for word in shlex.split(line, comments=True):
            if re.match(r"(launch|tools|examples)/.*\.(sh|sbatch|py|yaml)$", word):
                assert (ROOT / word).is_file(), f"{path}: {line}"
                found += 1
    assert found > 3
