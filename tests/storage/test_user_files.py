"""Values are shown cut, damaged JSON is a ValueError, types of JSON values are checked, no memory is recognized."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.user_files import SHOWN, check_fields, is_out_of_memory, loading, one_line, parse_json, shown


@dataclass(frozen=True)
class Fields:
    """Each kind of type that the dataclasses of JSON files have."""

    count: int
    share: float
    name: str | None
    kind: Literal["a", "b"]
    sizes: list[list[int]]
    files: dict[str, FileRecord]


GOOD: dict[str, Any] = {
    "count": 1,
    "share": 2,
    "name": None,
    "kind": "a",
    "sizes": [[1, 2], []],
    "files": {"x": {"bytes": 1, "sha256": "0"}},
}


def test_a_long_line_keeps_its_beginning_and_its_end() -> None:
    assert one_line(" a\n  b ") == "a b"
    line = one_line(f"file.jsonl:3: {'x' * 5000}; write it again")
    assert len(line) < 1000
    assert line.startswith("file.jsonl:3: x")
    assert line.endswith("x; write it again")


def test_fields_of_the_right_types_pass() -> None:
    check_fields(GOOD, Fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("share", "1"),
        ("name", 3),
        ("kind", "c"),
        ("kind", ["a"]),
        ("sizes", [1]),
        ("files", []),
        ("files", {"x": {"bytes": 1}}),
        ("files", {"x": {"bytes": "1", "sha256": "0"}}),
    ],
)
def test_a_field_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        check_fields(GOOD | {name: value}, Fields)


def test_what_a_library_raises_is_one_line() -> None:
    message = r"^a file is damaged \(KeyError: 'x'\); copy it again$"
    with pytest.raises(ValueError, match=message), loading("a file is damaged", "copy it again"):
        {}["x"]
    with pytest.raises(MemoryError), loading("a file is damaged", "copy it again"):
        raise MemoryError


def test_values_are_shown_cut() -> None:
    assert shown("x" * 9000).startswith("'xxx")
    for value in ("x" * 9000, [["x" * 50] * 9] * 9, {str(i): i for i in range(99)}, 10**900, b"x" * 900):
        assert len(shown(value)) <= SHOWN
    assert shown([0]) == "[0]"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[" * 500 + b"]" * 500, b'{"a":' * 200 + b"1" + b"}" * 200, b"1" * 6000, b"\xff"]
)
def test_json_that_cannot_be_read_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not UTF-8"):
        parse_json(text)


def test_out_of_memory_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
