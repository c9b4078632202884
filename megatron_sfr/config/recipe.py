"""Reads recipes, flat YAML files of option names and values, and refuses wrong ones without importing Megatron."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_sfr.config.flags.option_parser import OptionParser, stored_parser, to_flags
from megatron_sfr.storage.user_files import cut, loading, shown, with_path

INT = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without YAML 1.1's numbers to the base 60, which would read the steps 10:12 as 612."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != INT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    INT, re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"), list("-+0123456789")
)


def hyphenated(key: str) -> str:
    """`tensor-model-parallel-size` for both spellings of a key."""
    return key.replace("_", "-")


def read_recipe(path: Path, option_of: Callable[[str], str] = hyphenated) -> dict[str, Any]:
    """The options of a recipe, their names hyphenated, and ~/ or $NAME/ at the start of a value expanded.

    Args:
        path: a YAML file.
        option_of: names the option that a key sets; ValueError for an unknown key. By default the key itself.

    Raises:
        ValueError: the file is missing, is not a flat YAML mapping, sets one option twice, or names a variable of the
            environment that is not set.
    """
    if not path.is_file():
        why = "a folder, not a recipe; name the YAML file" if path.is_dir() else "no such recipe"
        raise ValueError(f"{path}: {why}")
    try:
        with with_path(path):
            loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: not a YAML mapping; write a flag's name and its value on each line")
        _check_keys(path, node, option_of)
        with loading(
            f"{path}: a value cannot be read", "put text in quotes where YAML takes it for a date or a number"
        ):
            recipe = loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {cut(str(error), 240)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply; recipes are flat") from error
    with naming([path]):
        return {hyphenated(str(key)): _expanded(value) for key, value in recipe.items()}


def _expanded(value: Any) -> Any:
    """A value that starts with ~/ or a variable of the environment, as a shell expands it on the command line."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("~/", "$")):
        return value
    if value.startswith("~/"):
        return os.path.expanduser(value)
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        raise ValueError(f"{shown(value)}: this variable of the environment is not set; set it, or write the path")
    return expanded


def _check_keys(path: Path, mapping: yaml.MappingNode, option_of: Callable[[str], str]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            raise ValueError(f"{path}:{line}: recipes are flat; write an option's name and its value")
        if isinstance(value, yaml.MappingNode):
            raise ValueError(f"{path}:{line}: {key.value}: recipes are flat; give each option its own line")
        try:
            option = option_of(key.value)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if option in seen:
            first, first_line = seen[option]
            what = f"{key.value} is" if first == key.value else f"{first} and {key.value} are one option, which is"
            raise ValueError(f"{path}: {what} set in line {first_line} and again in line {line}: leave one out")
        seen[option] = key.value, line


def split_recipes(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files of each --recipe in a command line, and its other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, action="append", default=[])
    found, flags = parser.parse_known_args(list(argv))
    return found.recipe, flags


def read_recipes(paths: Sequence[Path], parser: OptionParser) -> dict[str, Any]:
    """The options of several recipes, of which later ones take precedence. ValueError for an unknown key."""
    recipe: dict[str, Any] = {}
    for path in paths:
        recipe |= read_recipe(path, lambda key: parser.named(key)[0].dest)
    return recipe


def dotted_losses(recipes: Sequence[Path], flags: Sequence[str]) -> Iterator[tuple[Path | None, str]]:
    """Losses that are selected by a dotted path, which bring options, each with its recipe; None: in a flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", action="append", default=[])
    selected: list[tuple[Path | None, Any]] = [(None, x) for x in parser.parse_known_args(list(flags))[0].objective]
    selected += [(path, read_recipe(path).get("objective")) for path in recipes]
    yield from ((path, name) for path, name in selected if isinstance(name, str) and "." in name)


def check_recipes(recipes: Sequence[Path], flags: Sequence[str]) -> None:
    """Checks names, types and choices of options without Megatron; config/settings.py checks everything.

    Raises:
        ValueError: a recipe is missing or not one, or an option is unknown or has a value of another type.
    """
    losses = list(dotted_losses(recipes, flags))
    parser = stored_parser()
    if losses or parser is None:
        return
    recipe = read_recipes(recipes, parser)
    parser.read(flags := parser.spelled(flags))  # a wrong flag is not the recipes' fault
    with naming(recipes):
        parser.read([*to_flags(recipe, parser), *flags])


@contextmanager
def naming(recipes: Sequence[Path]) -> Iterator[None]:
    """Puts the names of the recipes before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        where = " + ".join(str(path) for path in recipes)
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
