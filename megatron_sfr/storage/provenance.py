"""Records of which command made an output. The same command then reports "up to date"; another one, what differs.

A record is kept beside the output or in it. It holds the identity of the command (everything that determines the bytes
that it writes) and the sizes of its files.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.integrity import StoredFileError
from megatron_sfr.storage.user_files import read_json


def contents_of(folder: Path, patterns: Iterable[str] = ("*",)) -> list[tuple[str, int, int]]:
    """(name, size, modification time) of files in a folder: a cheap fingerprint of a model."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def sizes_of(folder: Path) -> dict[str, int]:
    """The size of every file under a folder, by relative name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def write_record(record: Path, identity: Mapping[str, object], files: Mapping[str, int]) -> None:
    """Records an identity and the sizes of its files by their names relative to the record's folder."""
    with replacing(record) as file:
        json.dump({"identity": identity, "files": files}, file)


def read_record(record: Path) -> dict[str, Any] | None:
    """{"identity": ..., "files": {name: bytes}}, or None if there is no readable record."""
    try:
        content = read_json(record)
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= {"identity", "files"} else None


def is_up_to_date(output: Path, record: Path, identity: Mapping[str, object]) -> bool:
    """Whether an output is complete and was made by a command of this identity; False if there is no output.

    Raises:
        StoredFileError: the output is another command's, or its files have changed.
    """
    if not output.exists():
        return False
    known = read_record(record)
    if known is None:
        raise StoredFileError(f"{output} exists, and nothing says what made it")
    if changed := differences(known["identity"], identity):
        raise StoredFileError(f"{output} exists, made with other values of {', '.join(changed)}")
    for name, size in known["files"].items():
        path = record.parent / name
        now = path.stat().st_size if path.is_file() else None
        if now != size:
            raise StoredFileError(f"{path} {'is missing' if now is None else f'has {now:,} bytes instead of {size:,}'}")
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, object]) -> list[str]:
    """The keys in which two identities differ; keys of nested mappings are joined by dots."""
    then, now = _flat(old), _flat(json.loads(json.dumps(new)))
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": x for inner, x in _flat(value).items()}
        else:
            flat[key] = value
    return flat
