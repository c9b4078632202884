"""Options have plain names in Python and a prefix in flags, recipes and files."""

import inspect
from dataclasses import dataclass, field
from typing import Literal

import pytest

from megatron_sfr.option_names import from_arguments, named, option_names, required, to_arguments


@named("x_", kind="x")
@dataclass(frozen=True)
class Options:
    limit: int = field(metadata={"hint": "measure it"})
    kind: str = "none"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"`limit` = {self.limit} with `kind` = {self.kind}: `other` is not a field")


def test_options_are_built_from_arguments_and_become_arguments_again() -> None:
    arguments = {"x_limit": 3, "x": "some", "y": 1}
    options = from_arguments(Options, arguments)
    assert options == Options(3, "some")
    assert to_arguments(options) == {"x_limit": 3, "x": "some"}
    assert option_names(Options) == {"limit": "x_limit", "kind": "x"}
    assert required(Options) == {"x_limit": "measure it"}


def test_a_value_that_is_no_choice_is_refused() -> None:
    """Python accepts any value for a field of type Literal."""

    @named("y_")
    @dataclass(frozen=True)
    class Chosen:
        kind: Literal["a", "b"] = "a"

    assert Chosen("b") == Chosen(kind="b")
    assert list(inspect.signature(Chosen).parameters) == ["kind"]
    with pytest.raises(ValueError, match=r"^`kind` = 'c': choose a, b$"):
        Chosen("c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^y_kind = 'c': choose a, b$"):
        from_arguments(Chosen, {"y_kind": "c"})


def test_an_error_names_the_options() -> None:
    with pytest.raises(ValueError, match=r"^`limit` = 0 with `kind` = a: `other` is not a field$"):
        Options(0, "a")
    with pytest.raises(ValueError, match=r"^x_limit = 0 with x = a: `other` is not a field$"):
        from_arguments(Options, {"x_limit": 0, "x": "a"})
