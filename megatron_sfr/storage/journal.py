"""Array files that grow together, with a journal of their last consistent state, from which a killed run resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from numpy.typing import DTypeLike

from megatron_sfr.storage.arrays import FlatWriter
from megatron_sfr.storage.integrity import FileRecord
from megatron_sfr.storage.manifest import empty_folder
from megatron_sfr.storage.user_files import read_json

JOURNAL = "journal.json"


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
