"""The parser of all options, and a stored copy of it for commands that answer before Megatron is imported.

Megatron and torch take seconds to import. The copy, options.json, has the names of all options, and their types and
choices where these are plain. It accepts all that the parser accepts. `python tools/write_flags_page.py` writes it.
"""

import argparse
import difflib
import enum
import json
import re
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from megatron_sfr.storage.user_files import cut, shown

LONG_VALUE = re.compile(r"'[^']{80,}'")  # in argparse's messages
STORED = Path(__file__).with_name("options.json")
ENGINE = "megatron-core"
"""The distribution whose version the copy belongs to."""
_TYPES: dict[str, type] = {"int": int, "float": float}
NAMES_ELSEWHERE = {
    "batch-size": "micro-batch-size",
    "cp": "context-parallel-size",
    "epochs": "train-epochs",
    "ep": "expert-model-parallel-size",
    "learning-rate": "lr",
    "max-steps": "train-iters",
    "num-train-epochs": "train-epochs",
    "output-dir": "save",
    "per-device-train-batch-size": "micro-batch-size",
    "pp": "pipeline-model-parallel-size",
    "tp": "tensor-model-parallel-size",
    "warmup-steps": "lr-warmup-iters",
}
"""What other trainers call Megatron's options."""


class OptionParser(argparse.ArgumentParser):
    """Parses flags, and finds the options of recipe keys. What is unknown or malformed is a ValueError."""

    def __init__(self) -> None:
        super().__init__(prog="megatron_sfr.train", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "a switch takes no value, and this one has")
        raise ValueError(LONG_VALUE.sub(lambda found: f"{cut(found[0], 79)}'", message))

    def read(self, flags: Sequence[str]) -> argparse.Namespace:
        """Parses flags. ValueError for the first unknown flag."""
        args, unknown = self.parse_known_args(list(flags))
        if unknown:
            raise ValueError(self._unknown(unknown[0].split("=")[0]))
        return args

    def spelled(self, flags: Sequence[str]) -> list[str]:
        """Flags in Megatron's spelling: --num_layers means --num-layers, as in a recipe."""
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        return [self._spelled(flag, known) if flag.startswith("--") else flag for flag in flags]

    def _spelled(self, flag: str, known: dict[str, str]) -> str:
        name, equals, value = flag.partition("=")
        return known.get(name.replace("_", "-"), name) + equals + value

    def _unknown(self, wrong: str) -> str:
        """The message for a word that belongs to no flag."""
        if not wrong.startswith("-"):
            return f"{shown(wrong)} belongs to no flag: give options as --name value; a switch takes no value"
        wrong = wrong.replace("_", "-")
        on = self._option_string_actions.get(f"--{wrong.removeprefix('--no-')}")
        if wrong.startswith("--no-") and on is not None and on.nargs == 0:
            key = wrong.removeprefix("--no-").replace("-", "_")
            return f"unknown flag {wrong}: to turn {key} off, set `{key}: false` in a later recipe"
        return f"unknown flag {wrong}{nearest(wrong, self._option_string_actions)}"

    def named(self, key: str) -> tuple[argparse.Action, str | None]:
        """The action that a recipe key means and, where the key is itself a flag's name, that flag."""
        name = key.replace("_", "-")
        if (action := self._option_string_actions.get(f"--{name}")) is not None:
            return action, f"--{name}"
        for action in self._actions:
            if action.dest.replace("_", "-") == name:
                return action, None
        names = {option.removeprefix("--").replace("-", "_") for option in self._option_string_actions}
        raise ValueError(f"unknown key {shown(key)}{nearest(key.replace('-', '_'), names)}")


def nearest(wrong: str, names: Iterable[str]) -> str:
    """'; did you mean X?', or an empty string if no name is similar."""
    names, name = list(names), wrong.removeprefix("--").replace("_", "-")
    if (here := NAMES_ELSEWHERE.get(name)) is not None:
        close = ["--" + here if wrong.startswith("--") else here.replace("-", "_")]
    else:
        close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def to_flags(recipe: dict[str, Any], parser: OptionParser) -> list[str]:
    """The flags of a recipe. A value of null keeps upstream's default."""
    flags: list[str] = []
    for key, value in recipe.items():
        action, flag = parser.named(key)
        if value is not None:
            flags += (_switch if action.nargs == 0 else _with_values)(key, value, action, flag)
    return flags


def _switch(key: str, value: Any, action: argparse.Action, flag: str | None) -> list[str]:
    """The flag of an option without values: it turns something on or, for --no-x and --disable-x, off."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}: {shown(value)} is neither true nor false")
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[0 if value else -1]]
    turns = True if flag else getattr(action, "const", True)
    return [flag or action.option_strings[0]] if value == turns else []


def _with_values(key: str, value: Any, action: argparse.Action, flag: str | None) -> list[str]:
    values = value if isinstance(value, list) and action.nargs is not None else [value]
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, str | int | float)]:
        expected = "a value or a list of values" if action.nargs is not None else "one value"
        kind = {bool: "true or false", date: "a date", datetime: "a date"}.get(type(wrong[0]))
        quote = f", in quotes where YAML takes it for {kind}" if kind else ""
        raise ValueError(f"{key}: {shown(wrong[0])} is not {expected}; write text or a number{quote}")
    name, texts = flag or action.option_strings[0], [str(v) for v in values]
    dashed = action.nargs is None and texts[0].startswith("-")  # argparse would take it for an option
    return [f"{name}={texts[0]}"] if dashed else [name, *texts]


def stored_parser() -> OptionParser | None:
    """The stored copy of the parser; None if another version of Megatron is installed, whose options may differ."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    try:
        if version(ENGINE) != stored[ENGINE]:
            return None
    except PackageNotFoundError:
        return None
    parser = OptionParser()
    for option in stored["options"]:
        flags, kind = option.pop("flags"), option.pop("type", None)
        if kind == "bool":
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **option)
        elif "const" in option:
            parser.add_argument(*flags, action="store_const", **option)
        else:
            parser.add_argument(*flags, type=_TYPES.get(kind, str), **option)
    return parser


def stored_text(parser: argparse.ArgumentParser) -> str:
    """The content of options.json: one line for each option, with what `add_argument` needs."""
    options = (_stored(action) for action in parser._actions if action.dest != "help")
    lines = ",\n".join(json.dumps(option) for option in options)
    return f'{{"{ENGINE}": "{version(ENGINE)}", "options": [\n{lines}\n]}}\n'


def _stored(action: argparse.Action) -> dict[str, Any]:
    flags, names = list(action.option_strings), {"dest": action.dest}
    if isinstance(action, argparse.BooleanOptionalAction):
        return {"flags": [flag for flag in flags if f"--no-{flag[2:]}" in flags], **names, "type": "bool"}
    if action.nargs == 0:
        return {"flags": flags, **names, "const": action.const}
    found: dict[str, Any] = {"flags": flags, **names}
    if action.nargs is not None:
        found["nargs"] = action.nargs
    choices = list(action.choices or ())
    if action.type in (int, float):
        found["type"] = action.type.__name__
    elif getattr(action.type, "__name__", "") == "enum_type_handler":  # Megatron's: an enum's member by its name
        choices = list(type(choices[0]).__members__)
    elif action.type not in (None, str):
        choices = []  # of values that only Megatron can compare
    assert not any(isinstance(choice, enum.Enum) for choice in choices), f"{flags}: choices of an unknown kind"
    return found | ({"choices": choices} if choices else {})
