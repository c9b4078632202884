"""A file of lines that a killed run leaves half written and the same run, started again, ends with the same bytes."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sfr.storage.atomic import sync_folder
from megatron_sfr.storage.integrity import hint
from megatron_sfr.storage.lock import hold
from megatron_sfr.storage.provenance import differences, is_up_to_date, read_record, write_record


def record_of(path: Path) -> Path:
    """Where a file's record is: what command writes it, and its size once it is finished."""
    return path.with_name(f".{path.name}.identity.json")


def is_finished(path: Path, identity: Mapping[str, object]) -> bool:
    """Whether a file is there, from a finished run of this identity; ValueError where it is another one's."""
    with hint("choose another --output, or remove it"):
        return is_up_to_date(path, record_of(path), identity)


@contextmanager
def resumable(
    path: Path, identity: Mapping[str, object], boundary: Callable[[int], int]
) -> Iterator[tuple[IO[str], int]]:
    """A text file to append lines to, and how many it has already; it takes its name when the block ends well.

    Until then it is `.NAME.partial`. The record beside it stays. Of the complete lines that an earlier run left,
    boundary(lines) stay.

    Raises:
        ValueError: the file or the partial one is of another identity, or another process is writing it.
    """
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
        with open(partial, "a" if done else "w", encoding="utf-8", buffering=1) as file:  # a line is written at once
            yield file, done
            file.flush()
            os.fsync(file.fileno())
        write_record(record, identity, {path.name: partial.stat().st_size})
        partial.replace(path)
        sync_folder(path.parent)


def _keep(partial: Path, boundary: Callable[[int], int]) -> int:
    """Cuts the file after boundary(its whole lines) lines, and says how many that is."""
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
