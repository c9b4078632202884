"""Array files: arrays of one dtype, appended while a folder is written and memory-mapped for reading.

The files of a folder grow together, with a journal of their last consistent state, from which a killed run resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.manifest import empty_folder
from megatron_sfr.storage.user_files import read_json

BLOCK = 1 << 20
JOURNAL = "journal.json"


class FlatWriter:
    """Appends arrays of one dtype to a file and maintains its checksum.

    Creates the file, or appends after the bytes recorded in `kept`. Raises ValueError if these bytes have changed.
    """

    def __init__(self, path: Path, dtype: DTypeLike, kept: FileRecord | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._sha256 = hashlib.sha256()
        self._file = open(path, "r+b" if kept else "wb")  # noqa: SIM115  closed on leaving the writer's own `with`
        if kept:
            try:
                self._resume(path, kept)
            except ValueError:
                self._file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: ArrayLike) -> None:
        data = np.asarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)

    @property
    def bytes(self) -> int:
        """Size of the file: kept and appended bytes."""
        return self._file.tell()

    def flush(self) -> FileRecord:
        """Passes appended data to the operating system, so that it survives this process. Returns the file's record."""
        self._file.flush()
        return {"bytes": self._file.tell(), "sha256": self._sha256.hexdigest()}

    def finish(self) -> FileRecord:
        """Flushes to disk. Returns the file's record."""
        record = self.flush()
        os.fsync(self._file.fileno())
        return record

    def _resume(self, path: Path, kept: FileRecord) -> None:
        left = kept["bytes"]
        while left and (block := self._file.read(min(left, BLOCK))):
            self._sha256.update(block)
            left -= len(block)
        if left or self._sha256.hexdigest() != kept["sha256"]:
            raise ValueError(f"{path} is not what was written; remove it")
        self._file.seek(kept["bytes"])  # between reading and writing
        self._file.truncate()


def map_flat(path: Path, dtype: DTypeLike) -> np.ndarray:
    """The file as a read-only memory-mapped array."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


class JournaledFiles:
    """The array files of a folder (name: dtype) and the state that their writer saved at the last `commit`.

    `about` is the fingerprint of the output (JSON values). If the journal has another fingerprint, or files differ from
    its record, the folder is emptied and `state` is None. A commit therefore needs no flush to disk: the checksums
    reveal what a power failure lost.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, DTypeLike], about: dict[str, Any]) -> None:
        self.folder = folder
        self.state: dict[str, Any] | None = None
        self._about = json.loads(json.dumps(about))
        self._files: dict[str, FlatWriter] = {}
        self._stack = ExitStack()
        journal = self._read()
        if journal is not None and journal["files"].keys() == dtypes.keys() and self._open(dtypes, journal["files"]):
            self.state = journal["state"]
        else:
            empty_folder(folder)
            self._open(dtypes, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> FlatWriter:
        return self._files[name]

    def commit(self, state: dict[str, Any]) -> None:
        """Records everything appended so far as consistent, with the `state` (JSON values) needed to resume."""
        files = {name: file.flush() for name, file in self._files.items()}
        temporary = self.folder / f".{JOURNAL}.partial"
        temporary.write_text(json.dumps({"about": self._about, "files": files, "state": state}), encoding="utf-8")
        temporary.replace(self.folder / JOURNAL)

    def finish(self) -> dict[str, FileRecord]:
        """Flushes and closes all files and deletes the journal, so that the folder can be published."""
        records = {name: file.finish() for name, file in self._files.items()}
        self.close()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return records

    def _read(self) -> dict[str, Any] | None:
        try:
            journal = read_json(self.folder / JOURNAL)
        except (FileNotFoundError, ValueError):
            return None
        return journal if isinstance(journal, dict) and journal.get("about") == self._about else None

    def _open(self, dtypes: Mapping[str, DTypeLike], kept: dict[str, FileRecord]) -> bool:
        """Whether the files could be opened in the recorded state. New files always can."""
        with ExitStack() as stack:
            try:
                for name, dtype in dtypes.items():
                    path = self.folder / name
                    self._files[name] = stack.enter_context(FlatWriter(path, dtype, kept.get(name)))
            except (FileNotFoundError, ValueError):
                return False
            self._stack = stack.pop_all()
            return True


@contextmanager
def discard_without_journal(folder: Path) -> Iterator[None]:
    """After an error, removes a folder that has no state to resume from."""
    try:
        yield
    except BaseException:
        if not (folder / JOURNAL).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
