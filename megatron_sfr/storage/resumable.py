"""Resumable text files: a killed run leaves a partial file, and the same run, started again, completes it with the same
bytes."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sfr.storage.atomic import link_target, sync_folder
from megatron_sfr.storage.integrity import hint
from megatron_sfr.storage.lock import hold
from megatron_sfr.storage.provenance import differences, is_up_to_date, read_record, write_record


def record_of(path: Path) -> Path:
    """Path of a file's record: the command that writes it, and its size once it is complete."""
    path = link_target(path)
    return path.with_name(f".{path.name}.identity.json")


def is_finished(path: Path, identity: Mapping[str, object]) -> bool:
    """Whether a finished run of this identity wrote the file. Raises ValueError if another one did."""
    with hint("choose another --output, or remove it"):
        return is_up_to_date(path, record_of(path), identity)


@contextmanager
def resumable(
    path: Path, identity: Mapping[str, object], boundary: Callable[[int], int]
) -> Iterator[tuple[IO[str], int]]:
    """A text file to append lines to, and the number of lines it already has. It gets its name when the block succeeds.

    Until then it is called `.NAME.partial`, with a record beside it. Of the n complete lines left by an earlier run,
    the first `boundary(n)` are kept.

    Raises:
        ValueError: the file or its partial form has another identity, or another process is writing it.
    """
    path = link_target(path)
    partial, record = path.with_name(f".{path.name}.partial"), record_of(path)
    with hold(path):
        is_finished(path, identity)
        known = read_record(record)
        if partial.exists() and known is not None and (changed := differences(known["identity"], identity)):
            raise ValueError(
                f"{partial} was begun by another command, with other values of {', '.join(changed)}: remove it to "
                "start again, or run that command again to finish it"
            )
        done = _keep(partial, boundary) if known is not None else 0
        write_record(record, identity, {})
        try:
            with open(partial, "a" if done else "w", encoding="utf-8", buffering=1) as file:  # line-buffered
                yield file, done
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if not partial.stat().st_size:  # nothing to resume, and another command may follow
                partial.unlink()
                record.unlink()
            raise
        write_record(record, identity, {path.name: partial.stat().st_size})
        partial.replace(path)
        sync_folder(path.parent)


def _keep(partial: Path, boundary: Callable[[int], int]) -> int:
    """Truncates the file after `boundary(n)` of its n complete lines. Returns how many remain."""
    if not partial.exists():
        return 0
    with open(partial, "r+b") as file:
        ends = [0]
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        kept = boundary(len(ends) - 1)
        file.truncate(ends[kept])
    return kept
