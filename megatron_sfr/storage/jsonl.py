"""Records of files: one by one, or in chunks of complete records with their positions, for worker processes.

A record is a line of JSON, whatever container it comes from (containers.py). Nothing here knows what it means:
conversations and documents are read in the same way.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sfr.storage.containers import read_pieces

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """A record: one line of a file, unchanged."""

    source: str
    line: int
    text: bytes


class RecordError(ValueError):
    """What is wrong with a record and what to do; the reader adds the file and the line."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be trained on, with the reason."""

    record: Record
    reason: str

    def __str__(self) -> str:
        return f"{self.record.source}:{self.record.line}: {self.reason}"

    def line(self) -> bytes:
        """The line of rejected.jsonl, from which the record can be repaired."""
        text = self.record.text.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        fields = {"file": self.record.source, "line": self.record.line, "reason": self.reason, "row": text}
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Position:
    """Where reading continues in a list of files."""

    file: int = 0
    """Index of the file."""
    offset: int = 0
    """Offset in the file, in the unit of its reader: bytes of text, or records."""
    record: int = 1
    """Number of the next record in the file, from 1: its line in JSONL."""
    done: int = 0
    """Bytes that were read of all files, for the progress bar."""


@dataclass(frozen=True)
class Chunk:
    """Complete lines of a file. `line` is the number of the first one, `end` the position after the last."""

    source: str
    line: int
    text: bytes
    end: Position

    def records(self) -> Iterator[Record]:
        """The lines that are not blank, without a byte order mark."""
        for line, text in enumerate(io.BytesIO(self.text), start=self.line):
            text = text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            if text.strip():
                yield Record(self.source, line, text)


def read_chunks(paths: Sequence[Path], start: Position = Position(), size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The records of files from `start` on, about `size` bytes at a time. `Position.done` counts bytes of the files.

    Raises:
        ValueError: a file is damaged, or needs a library that is not installed.
    """
    before = sum(path.stat().st_size for path in paths[: start.file])
    for number in range(start.file, len(paths)):
        position = start if number == start.file else Position(number)
        for piece in read_pieces(paths[number], position.offset, size):
            end = Position(number, piece.offset, position.record + piece.records, before + piece.done)
            yield Chunk(str(paths[number]), position.record, piece.text, end)
            position = end
        before += paths[number].stat().st_size


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, numbered from 1: in JSONL its lines that are not blank, without a byte order mark."""
    for chunk in read_chunks([path]):
        yield from chunk.records()
