"""Reads recipes: flat YAML files of option names and values. Without Megatron, so that the launcher starts quickly."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_sfr.storage.user_files import cut, loading


def hyphenated(key: str) -> str:
    """`tensor-model-parallel-size` for both spellings of a key."""
    return key.replace("_", "-")


def read_recipe(path: Path, option_of: Callable[[str], str] = hyphenated) -> dict[str, Any]:
    """The options of a recipe, their names hyphenated.

    Args:
        path: a YAML file.
        option_of: names the option that a key sets; ValueError for an unknown key. By default the key itself.

    Raises:
        ValueError: the file is missing, is not a flat YAML mapping, or sets one option twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
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
    return {hyphenated(str(key)): value for key, value in recipe.items()}


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


def nearest(wrong: str, names: Any) -> str:
    """'; did you mean X?', or an empty string if no name is similar."""
    close = difflib.get_close_matches(wrong, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""
