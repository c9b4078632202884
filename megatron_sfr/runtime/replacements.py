"""Names of upstream that are replaced: tables of what is replaced and why, and their application.

A table lives beside the code that needs it: `runtime/cpu.py` (the CPU backend), `runtime/durable.py`,
`runtime/resharding.py`, `runtime/synchronous_save.py`, `training/head_optimizer.py` and others (docs/upstream.md). The
CPU backend's stays applied for the rest of the process, those of `model/` while a model is built or computes; a
training run applies the others for its duration, with `replaced`. Each entry has a contract test
(tests/runtime/test_replacements.py) that fails when upstream moves or changes the name.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

VERSIONS = {"torch": "2.13.0", "megatron-core": "0.19.2"}
"""The versions that the tables are written against and tested with."""


@dataclass(frozen=True)
class Replacement:
    """One replaced name of upstream."""

    module: str
    """The module that has the name."""
    name: str
    """Attribute path in the module, such as Class.method."""
    value: Any
    """What replaces it. If marked by `wrapper`, a function from the original to what replaces it."""
    why: str
    """What upstream does there, and why that does not work here."""
    takes: tuple[str, ...] = ()
    """The original's leading parameters, if the replacement relies on them."""

    def owner(self) -> Any:
        """The object whose attribute is replaced."""
        return functools.reduce(getattr, self.name.split(".")[:-1], importlib.import_module(self.module))

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.split(".")[-1]

    def original(self) -> Any:
        """The current value of the name. Raises AttributeError if upstream no longer has it."""
        return getattr(self.owner(), self.attribute)

    def apply(self) -> Callable[[], None]:
        """Replaces the name; returns a function that restores it."""
        owner, original = self.owner(), self.original()
        wraps = getattr(self.value, "wraps_original", False)
        setattr(owner, self.attribute, self.value(original) if wraps else self.value)
        return functools.partial(setattr, owner, self.attribute, original)


def wrapper(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Marks a function that makes a replacement from the original."""
    make.wraps_original = True  # type: ignore[attr-defined]
    return make


@contextmanager
def replaced(table: Iterable[Replacement]) -> Iterator[None]:
    """Context in which the names of a table are replaced."""
    with ExitStack() as restores:
        for entry in table:
            restores.callback(entry.apply())
        yield
