"""Names of options outside Python: in flags, recipes and stored arguments. There they carry a prefix, fields do not."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

_PREFIXES: dict[type, tuple[str, dict[str, str]]] = {}


def named[Options](prefix: str, **others: str) -> Callable[[type[Options]], type[Options]]:
    """A class decorator for a dataclass of options: the option of a field is the prefix and the field's name.

    It also refuses values that a field's Literal does not list, which Python itself accepts.

    Args:
        prefix: such as `gem_`; the field `beta` is then the option `gem_beta`, with the flag `--gem-beta`.
        others: {field: option} for options that are named differently.
    """

    def decorate(options: type[Options]) -> type[Options]:
        _PREFIXES[options] = prefix, others
        options.__init__ = _checking(options)  # type: ignore[method-assign]
        return options

    return decorate


def _checking(options: type) -> Callable[..., None]:
    """The class's `__init__`, with a check of the fields whose type is a Literal."""
    initialize: Callable[..., None] = options.__init__  # type: ignore[misc]
    choices = {f.name: get_args(f.type) for f in fields(options) if get_origin(f.type) is Literal}

    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"`{field}` = {getattr(self, field)!r}: choose {', '.join(map(str, known))}")

    return __init__


def option_names(options: type) -> dict[str, str]:
    """{field: option} of a dataclass. Without `named` an option has the name of its field."""
    prefix, others = _PREFIXES.get(options, ("", {}))
    return {f.name: others.get(f.name, prefix + f.name) for f in fields(options)}


def from_arguments[Options](options: type[Options], arguments: Mapping[str, Any]) -> Options:
    """A dataclass of options from arguments by option name.

    Raises:
        ValueError: the dataclass refuses a value. Fields that its message writes as `` `field` `` are replaced by their
            options.
        KeyError: an argument is missing.
    """
    names = option_names(options)
    try:
        return options(**{field: arguments[option] for field, option in names.items()})
    except ValueError as error:
        raise ValueError(re.sub(r"`(\w+)`", lambda m: names.get(m[1], m[0]), str(error))) from error


def to_arguments(options: Any) -> dict[str, Any]:
    """The values of a dataclass of options by option name, as arguments and files have them."""
    return {option: getattr(options, field) for field, option in option_names(type(options)).items()}


def required(options: type) -> dict[str, str]:
    """Options without a default, with the `hint` of the field's metadata: {option: hint}."""
    names = option_names(options)
    return {
        names[f.name]: f.metadata.get("hint", "")
        for f in fields(options)
        if f.default is MISSING and f.default_factory is MISSING
    }
