"""Lines of JSONL files: one by one, or in chunks of whole lines with their place, which workers take.

Nothing here knows what a line means: chats and documents are read alike.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of a file, as it stands there."""

    source: str
    line: int
    text: bytes


class RowError(ValueError):
    """What is wrong with a row and what to do; the reader adds the file and the line."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, with the reason."""

    row: Row
    reason: str

    def __str__(self) -> str:
        return f"{self.row.source}:{self.row.line}: {self.reason}"

    def line(self) -> bytes:
        """As a line of rejected.jsonl, for someone to repair."""
        text = self.row.text.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        record = {"file": self.row.source, "line": self.row.line, "reason": self.reason, "row": text}
        return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Place:
    """The beginning of a line: the index of its file, the byte in it, and its number in it, from 1."""

    file: int = 0
    byte: int = 0
    line: int = 1


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file, from `start` on."""

    source: str
    start: Place
    text: bytes

    @property
    def end(self) -> Place:
        start = self.start
        return Place(start.file, start.byte + len(self.text), start.line + self.text.count(b"\n"))

    def rows(self) -> Iterator[Row]:
        """The lines that are not blank, without a byte order mark."""
        for line, text in enumerate(io.BytesIO(self.text), start=self.start.line):
            text = text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            if text.strip():
                yield Row(self.source, line, text)


def read_chunks(paths: Sequence[Path], start: Place = Place(), size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The files from `start` on, `size` bytes and the rest of a line at a time."""
    for number in range(start.file, len(paths)):
        place = start if number == start.file else Place(number)
        with open(paths[number], "rb") as file:
            file.seek(place.byte)
            while text := file.read(size) + file.readline():
                yield (chunk := Chunk(str(paths[number]), place, text))
                place = chunk.end


def read_rows(path: Path) -> Iterator[Row]:
    """The lines of a file that are not blank, numbered from 1, without a byte order mark."""
    for chunk in read_chunks([path]):
        yield from chunk.rows()
