"""Files from users: JSON, values in messages, and calls of libraries that parse. Problems are raised as ValueError.

Every reader of JSON, and every library call that loads a user's files, goes through this module.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints, is_typeddict

SHOWN = 80
DEEPEST = 100  # levels of JSON: far more than any record has, and within Python's recursion limit
_REPR = reprlib.Repr(maxlevel=4, maxstring=SHOWN, maxother=SHOWN, maxlong=40)
_NO_MEMORY = (
    *("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "CUDA out of memory", "bad_alloc"),
    "can't start new thread",  # no memory for its stack, or a limit of processes
)


def shown(value: object) -> str:
    """The repr of a value for a message, cut to 80 characters."""
    return cut(_REPR.repr(value))


def cut(text: str, characters: int = SHOWN) -> str:
    """The text in one line, truncated if it is longer than `characters`."""
    text = " ".join(text[: 8 * characters].split())
    return text if len(text) <= characters else f"{text[: characters - 3]}..."


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first names in alphabetical order for a message, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(text: str) -> str:
    """The text in one line; beyond 1,000 characters its beginning and end, which have the place and the hint."""
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:490]} ... {text[-490:]}"


def parse_json(text: bytes | str, repeated: list[str] | None = None) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError if it is damaged or nested too deeply.

    repeated: collects the names that occur more than once in an object, whose last value is kept.
    """

    def fields_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if repeated is not None and len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in fields if names.count(name) > 1)
        return fields

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        text = text.removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=None if repeated is None else fields_of)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read (nested more than {DEEPEST} levels deep)") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({cut(str(error))})") from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"not JSON that can be read (nested more than {DEEPEST} levels deep)")
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in inner if isinstance(x, dict | list)]
        if not level:
            return False
    return True


@contextmanager
def with_path(path: Path) -> Iterator[None]:
    """Adds the path to an error of the system that names no file, as those of a damaged disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def read_json(path: Path, hint: str = "") -> Any:
    """The value of a JSON file. Raises ValueError `path: reason; hint`, or OSError if the file cannot be opened."""
    try:
        with with_path(path):
            return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}{'; ' + hint if hint else ''}") from error


def read_json_object(path: Path, hint: str = "") -> dict[str, Any]:
    """Like `read_json`, for a file that holds an object."""
    value = read_json(path, hint)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {shown(value)}{'; ' + hint if hint else ''}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value of an option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose {', '.join(choices)}")


def positive_integer(name: str, value: object) -> int:
    """The value of an option, given as text or a number, as an integer of at least 1. Raises ValueError."""
    try:
        number = int(str(value))
    except ValueError as error:
        raise ValueError(f"{name} = {cut(str(value))}: give a whole number") from error
    if number < 1:
        raise ValueError(f"{name} = {number}: give at least 1")
    return number


def has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type: a plain one, or one made of list, dict, tuple, |, Literal and TypedDict."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (UnionType, Union):
        return any(has_type(value, part) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(has_type(x, inner[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(has_type(x, inner[1]) for x in value.values())
    if is_typeddict(hint):
        parts = get_type_hints(hint)
        known = isinstance(value, dict) and value.keys() == parts.keys()
        return known and all(has_type(value[name], part) for name, part in parts.items())
    return type(value) is hint or (hint is float and type(value) is int)


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number that a float holds, and neither NaN nor infinite."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def check_fields(content: dict[str, Any], cls: type) -> None:
    """Raises ValueError for the first value of a JSON object whose type differs from that of the dataclass field."""
    for name, hint in get_type_hints(cls).items():
        if name in content and not has_type(content[name], hint):
            raise ValueError(f"{name} is {shown(content[name])}")


def strings_of(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


@contextmanager
def loading(what: str, hint: str) -> Iterator[None]:
    """Turns exceptions of a library that parses a user's files into ValueError `what (reason); hint`.

    Libraries raise many types for damaged files: tokenizers plain Exception, transformers AttributeError and TypeError,
    torch AssertionError. Out-of-memory errors are not the files' fault and pass through.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} ({reason(error)}); {hint}") from error


def reason(error: BaseException) -> str:
    """A library exception as text: the first line of its message, with its type unless that is a generic one."""
    said = cut(re.split(r"(?<!:)\n", str(error).strip(), maxsplit=1)[0], 200)
    if type(error).__name__ in ("Exception", "ValueError", "OSError", "TemplateError") and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or its cause, means that memory ran out, in Python or in torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _NO_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
