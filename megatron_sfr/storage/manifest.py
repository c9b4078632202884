"""Manifests: the JSON file, written last, that marks a folder as complete; and staging folders that are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypedDict

from megatron_sfr.storage.atomic import link_target, replacing, sync_folder
from megatron_sfr.storage.integrity import StoredFileError
from megatron_sfr.storage.lock import hold
from megatron_sfr.storage.user_files import check_fields, cut, read_json, read_json_object, shown

NAME = "manifest.json"
MOST = 1 << 62  # upper bound of a count or a size


class InputRecord(TypedDict):
    path: str
    sha256: str
    format: str


class Manifest(Protocol):
    """A frozen dataclass of JSON values; `kind` and `version` identify the format.

    A field with a default was added within its version: files without it can be read too.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]
    version: ClassVar[int]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically."""
    content = {"kind": manifest.kind, "version": manifest.version, **asdict(manifest)}
    with replacing(folder / NAME) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_manifest[M: Manifest](folder: Path, cls: type[M]) -> M:
    """The manifest of a folder. Raises StoredFileError if it is missing, damaged or of another kind or version."""
    path = folder / NAME
    try:
        content = read_json_object(path)
        kind, version = content.pop("kind"), content.pop("version")
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = "is a file, not a folder" if folder.is_file() else "does not exist"
        missing = "has no manifest.json: it is incomplete" if folder.is_dir() else missing
        raise StoredFileError(f"{folder} {missing}") from error
    except (ValueError, KeyError) as error:
        raise StoredFileError(f"{path} is damaged") from error
    if kind != cls.kind:
        raise StoredFileError(f"{folder} holds {cut(str(kind))}, not {cls.kind}")
    if version != cls.version:
        raise StoredFileError(f"{path} is of version {shown(version)}, this program reads version {cls.version}")
    known = {field.name for field in fields(cls)}
    required = {field.name for field in fields(cls) if field.default is MISSING}
    if not required <= content.keys() <= known:
        raise StoredFileError(f"{path} is damaged")
    try:
        check_fields(content, cls)
        if negative := [name for name, value in content.items() if type(value) is int and not 0 <= value <= MOST]:
            raise ValueError(f"{negative[0]} is {shown(content[negative[0]])}")
    except ValueError as error:
        raise StoredFileError(f"{path} is damaged: {error}") from error
    return cls(**content)


def is_of_kind(folder: Path, cls: type[Manifest]) -> bool:
    """Whether a folder has a manifest of a class, of any version. False if it cannot be read."""
    try:
        manifest = read_json(folder / NAME)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == cls.kind


@contextmanager
def staging(output: Path, *, keep: bool) -> Iterator[Path]:
    """A folder beside `output` to write in, for one process at a time.

    The block must move it away with `publish`. After an error it is removed, or kept for a later run (`keep`).
    """
    output = link_target(output)
    folder = output.parent / f".{output.name}.partial"
    with hold(output):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not keep:
                empty_folder(folder)
            yield folder
        except BaseException:
            if not keep:
                shutil.rmtree(folder)
            raise


def publish(folder: Path, output: Path) -> None:
    """Moves the finished files of `folder` to `output`, the manifest last. Other files in `output` remain."""
    output = link_target(output)
    if not output.exists():
        folder.rename(output)
    else:
        (output / NAME).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == NAME):
            path.replace(output / path.name)
        folder.rmdir()
    sync_folder(output.parent)


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
