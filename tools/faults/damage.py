"""Kinds of damage to files: bytes, JSON values, records, recipes, safetensors, templates. Each draws from a seed."""

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]
DEEP = 100_000
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    3.0,
    10**30,
    10**400,
    -(2**63),
    2**64,
    math.inf,
    math.nan,
    "",
    " ",
    "x",
    "1",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "x" * 9000,
    "\u202e\u0000\u001b[31m",
    [],
    [[]],
    [None],
    [0],
    ["x"],
    [{}],
    {},
    {"a": 1},
    {"a": {"b": []}},
    {"": ""},
]


def odd_value(rng: random.Random) -> Any:
    """A copy, which may be changed."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit."""
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros or noise, as a disk or a broken copy leaves it."""
    start = rng.randrange(max(1, len(data)))
    length = min(len(data) - start, rng.choice([1, 8, 64, 4096]))
    noise = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    return data[:start] + noise + data[start + length :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"\xff", b"\0", b"\n", b"\xef\xbb\xbf", b'"', b"}", rng.randbytes(9)]) + data[at:]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", b"x", data, rng.randbytes(64), b"\n\n"])


def replace_by_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(odd_value(rng)).encode()


def deep(data: bytes, rng: random.Random) -> bytes:
    return b"[" * DEEP + b"]" * DEEP if rng.random() < 0.5 else b'{"a":' * DEEP + b"1" + b"}" * DEEP


BYTES: list[Damage] = [empty, cut, flip, overwrite, insert, append]
WHOLE: list[Damage] = [*BYTES, replace_by_json, deep]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found = [(value, key) for key, _ in inner]
    return found + [place for _, child in inner for place in places(child)]


def change_value(content: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON value: another value, a key removed, renamed or added, two values exchanged."""
    found = places(content)
    if not found:
        return odd_value(rng)
    container, key = rng.choice(found if rng.random() < 0.5 else [place for place in found if place[0] is content])
    change = rng.randrange(8)
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(container, dict):
        container[rng.choice(["unknown", "", "x" * 300, key + " "])] = container.pop(key)
    elif change == 2 and isinstance(container, dict):
        container["unknown"] = odd_value(rng)
    elif change == 3:
        other, name = rng.choice(found)
        container[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(container[key]))
    elif change == 4:
        container[key] = [container[key]]
    elif change == 5 and isinstance(container[key], int | float):
        container[key] = rng.choice([container[key] * 2, container[key] + 1, -container[key], str(container[key])])
    else:
        container[key] = odd_value(rng)
    return content


def change_json(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(change_value(json.loads(data), rng))
    if rng.random() < 0.05 and text.startswith("{"):  # a key twice
        text = text[:-1] + ', "files": 1, "files": 2}'
    return text.encode("utf-8")


def change_record(data: bytes, rng: random.Random) -> bytes:
    """One record of a JSONL file, changed in one to three of its values."""
    lines = data.splitlines()
    at = 0 if rng.random() < 0.3 else rng.randrange(len(lines))
    record = json.loads(lines[at])
    for _ in range(rng.choice([1, 1, 2, 3])):
        record = change_value(record, rng)
    lines[at] = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + b"\n"


def change_line(data: bytes, rng: random.Random) -> bytes:
    """One line of a file, damaged as bytes, or replaced."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    others = [b"", b"{}", b"[", b"1" * 6000, b"\xff\xfe", b"NaN", lines[at] * 2, b"[" * DEEP, b"1e999", b'"\\ud800"']
    lines[at] = rng.choice([cut(lines[at], rng), overwrite(lines[at], rng), *others])
    return rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)


def grow_record(data: bytes, rng: random.Random) -> bytes:
    """One string of a record a hundred thousand times as long."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    record = json.loads(lines[at])
    found = [(box, key) for box, key in places(record) if isinstance(box[key], str)]
    if found:
        box, key = rng.choice(found)
        box[key] = rng.choice([box[key] * 100_000, "a" * 1_000_000, "\n" * 100_000, "😀" * 50_000])[:2_000_000]
    lines[at] = json.dumps(record).encode()
    return b"\n".join(lines) + b"\n"


RECORDS: list[Damage] = [change_record, change_record, change_record, change_line, grow_record, *WHOLE]
JSON: list[Damage] = [change_json, change_json, change_json, *WHOLE]


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file: its length, or a value inside."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return rng.choice([0, size - 1, size + 1, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        field = rng.choice(["dtype", "shape", "data_offsets"])
        odd: dict[str, list[Any]] = {
            "dtype": ["F16", "I64", "F8_E4M3", "X"],
            "shape": [[0], [1, 2, 3], [2**40]],
            "data_offsets": [[0, 4]],
        }
        header[name][field] = rng.choice(odd[field])
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


SAFETENSORS: list[Damage] = [change_safetensors, change_safetensors, *WHOLE]
