"""The table of all of Megatron's flags, the refusals that follow from it, and docs/flags.md, which it is printed as."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_sfr.config.flags.passed import PASSED
from megatron_sfr.config.flags.refused import DATA, MODEL, REFUSED, STEP
from megatron_sfr.config.flags.used import USED
from megatron_sfr.storage.user_files import cut

Status = Literal["refused", "used", "passed on"]
INTRODUCTION = """# Megatron's flags

All flags of Megatron's trainer (megatron-core 0.19.2, by their names in its arguments), and what becomes of them here.
Each was looked up in Megatron's source: who reads it, and whether our data, forward step or model replace that reader.
A flag that Megatron adds fails a test until it has a line here. `python tools/write_flags_page.py` prints this page.

## Refused

A recipe or command line that sets one of these to something else than its default ends in one line with the reason and
the remedy. Some are refused for certain values, or beside others, as the first column says.
"""
PARTS = (
    ("Data replaced by prepared folders", DATA),
    ("Loss and step replaced by ours", STEP),
    ("Models that are not trained here", MODEL),
)
PASSED_ON = """## Passed on

Megatron reads these and nothing of ours stands in the way. Groups are those of Megatron's parser. A few are accepted
and ignored by Megatron itself (`use_flash_attn`, `deprecated_use_mcore_models`), so that old scripts keep working.
"""


def table() -> dict[str, Status]:
    """What becomes of each flag."""
    found: dict[str, Status] = {}
    passed = (name for names in PASSED.values() for name in names.split())
    used = (name for names in USED for name in names.split())
    refused = (name for entry in REFUSED for name in entry.names.split())
    for status, names in (("passed on", passed), ("used", used), ("refused", refused)):
        for name in names:
            assert name not in found, f"{name} is in the table twice"
            found[name] = status  # type: ignore[assignment]
    return found


def refusal(args: argparse.Namespace, defaults: Mapping[str, Any]) -> str | None:
    """The first refused flag among parsed arguments, in one line; None where there is none."""
    for entry in REFUSED:
        for name in entry.names.split():
            value = getattr(args, name, defaults.get(name))
            if value != defaults.get(name) and (entry.when is None or entry.when(value, args)):
                return f"{name} = {cut(str(value), 40)}: {entry.reason}; {entry.remedy}"
    return None


def page() -> str:
    """docs/flags.md."""
    return "\n".join([INTRODUCTION, *_refused(), *_used(), PASSED_ON, *_passed()])


def _refused() -> Iterator[str]:
    for title, entries in PARTS:
        yield f"### {title}\n\n| flags | why | instead |\n|---|---|---|"
        for entry in entries:
            condition = f" ({entry.condition})" if entry.condition else ""
            yield f"| {_names(entry.names)}{condition} | {entry.reason} | {entry.remedy} |"
        yield ""


def _used() -> Iterator[str]:
    yield "## Used\n\nRead by this package too, with another default, or restricted.\n\n| flags | here |\n|---|---|"
    yield from (f"| {_names(names)} | {what} |" for names, what in USED.items())
    yield ""


def _passed() -> Iterator[str]:
    yield from (f"- **{group}**: {_names(names)}" for group, names in PASSED.items())
    yield ""


def _names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())
