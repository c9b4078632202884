"""Atomic writes: a file is written under a temporary name, flushed to disk and renamed. A crash leaves old or new."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any


def link_target(path: Path) -> Path:
    """The path itself, or the one that a symbolic link names, so that what is written keeps the link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path  # of links in a loop it returns one of them


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, which atomically replaces `path` when the block ends, or is removed if the block fails.

    Missing folders of the path are created. Processes that write the same path at the same time use separate temporary
    files; the last one wins. Temporary files that killed processes of this machine have left are removed.
    """
    path = link_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{path.name}.{os.uname().nodename}-"
    partial = path.with_name(f"{mine}{os.getpid()}.partial")
    for other in path.parent.glob(f"{escape(mine)}*.partial"):
        if not _is_running(other.name.removeprefix(mine).removesuffix(".partial")):
            other.unlink(missing_ok=True)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    """Whether a process of this machine may still be running, by the digits of its id."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True  # not one of ours
    return True


def sync_files(folder: Path) -> None:
    """Flushes all files under a folder to the disk, and the entries of its folders."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's directory entries, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it and do not need it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
