"""A file of lines that a killed run leaves half written and the same run, started again, ends with the same bytes."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sfr.evaluation.tables import whole
from megatron_sfr.runtime.user_files import read_json


@contextmanager
def resumable(
    path: Path, identity: Mapping[str, object], boundary: Callable[[int], int]
) -> Iterator[tuple[IO[str], int]]:
    """A text file to append lines to, and how many it has already; it takes its name when the block ends well.

    Until then it is `.NAME.partial`, beside it `.NAME.identity.json`. Of the whole lines that an earlier run left,
    boundary(lines) stay. ValueError where that run was of another identity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, record = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.identity.json")
    known = json.loads(json.dumps(identity))
    if partial.exists() and record.exists() and read_json(record, f"remove it and {partial}") != known:
        raise ValueError(
            f"{partial} was begun by another command (other models, prompts or options): remove it to start anew, "
            "or run that command again to finish it"
        )
    done = _keep(partial, boundary) if record.exists() else 0
    with whole(record) as file:
        json.dump(known, file)
    with open(partial, "a" if done else "w", encoding="utf-8", buffering=1) as file:  # each line is handed over at once
        yield file, done
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    record.unlink()


def contents_of(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of each file of a folder: cheap, and another model has others."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


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
