"""Containers of records, recognized by their first bytes: JSONL and JSON arrays, plain or compressed, Parquet, Arrow.

All are read in constant memory, in pieces of complete records; reading can start at the end of any piece. Every
container yields a record as a line of JSON, so that readers of records handle one form. gzip comes with Python; zstd,
Parquet and Arrow need pyarrow (the extra `datasets`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_sfr.storage.user_files import cut, loading

Container = Literal["jsonl", "array", "parquet", "arrow"]
Compression = Literal["none", "gzip", "zstd"]

_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_TABLES: dict[bytes, Container] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_PACKED: dict[bytes, str] = {**_MAGIC, **_TABLES, b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_ARRAY = re.compile(rb"\s*\[\s*\{")
_BETWEEN = re.compile(r"[\s,]*", re.ASCII)  # whose characters are bytes, for the offset
_HEAD = 4096
_BLOCK = 1 << 20
MOST_RECORD = 1 << 26
"""Characters of one record of a JSON array; a longer one counts as damage."""
BATCH_RECORDS = 1024
"""Records of a table that are read at a time."""


@dataclass(frozen=True)
class Piece:
    """Complete records of a file."""

    text: bytes
    """A line for each record; in JSONL as they are, blank lines included."""
    records: int
    """Number of lines."""
    offset: int
    """Where the next piece starts: bytes of uncompressed text, or records of a table."""
    done: int
    """Bytes of the file read so far."""


def read_pieces(path: Path, offset: int = 0, size: int = _BLOCK) -> Iterator[Piece]:
    """The records of a file from an offset on, about `size` bytes at a time.

    Raises:
        ValueError: the file is damaged, or needs a library that is not installed.
    """
    if path.exists() and not path.is_file():  # it is read more than once
        raise ValueError(f"{path} is not a regular file; write the records to one, and name it")
    with _reading(path):
        head = _head(path)
    table = next((container for magic, container in _TABLES.items() if head.startswith(magic)), None)
    if table is not None:
        pyarrow(path)
        with loading(f"{path} is not a readable {table} file", "make or download it again"):
            yield from _table_pieces(path, table, offset, size)
        return
    with _reading(path), _open_text(path, _compression(head)) as (text, raw):
        start = text.read(_HEAD)
    if packed := next((name for magic, name in _PACKED.items() if start.startswith(magic)), None):
        raise ValueError(f"{path} holds {packed} data where text is expected; unpack it")
    with _reading(path), _open_text(path, _compression(head)) as (text, raw):
        if _ARRAY.match(start.removeprefix(codecs.BOM_UTF8)):
            yield from _array_pieces(path, text, raw, offset, size)
        else:
            yield from _line_pieces(text, raw, offset, size)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _compression(head: bytes) -> Compression:
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "none")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what libraries raise for a damaged file into ValueError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({cut(str(error))}); make or download it again") from error
    except OSError as error:
        if error.errno is not None:  # of the system, not of pyarrow
            error.filename = error.filename or str(path)
            raise
        raise ValueError(f"{path} is damaged ({cut(str(error))}); make or download it again") from error


def pyarrow(path: Path) -> Any:
    """The library that reads this file."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path} is read by pyarrow, which is not installed; run: pip install 'megatron-sfr[datasets]'"
        ) from error
    return pyarrow


@contextmanager
def _open_text(path: Path, compression: Compression) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The uncompressed bytes, seekable to a later offset, and the file, whose position is the progress."""
    with open(path, "rb") as raw:
        if compression == "gzip":
            with gzip.GzipFile(fileobj=raw) as text:
                yield io.BufferedReader(text), raw
        elif compression == "zstd":
            yield io.BufferedReader(_Zstd(path, raw)), raw
        else:
            yield raw, raw


class _Zstd(io.RawIOBase):
    """The uncompressed bytes of a zstd file. Seeks forward, by reading."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        library = pyarrow(path)
        self._stream = library.CompressedInputStream(library.PythonFile(raw, "r"), "zstd")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        assert target >= self._position, "readers seek once, before they read"
        while self._position < target and (data := self._stream.read(min(_BLOCK, target - self._position))):
            self._position += len(data)
        return self._position


def _line_pieces(text: IO[bytes], raw: IO[bytes], offset: int, size: int) -> Iterator[Piece]:
    text.seek(offset)
    while lines := text.read(size) + text.readline():
        offset += len(lines)
        yield Piece(lines, lines.count(b"\n"), offset, offset if text is raw else raw.tell())


def _array_pieces(path: Path, text: IO[bytes], raw: IO[bytes], offset: int, size: int) -> Iterator[Piece]:
    """Records of a JSON array. The offset is a byte behind a record, so that reading continues inside the array."""
    text.seek(offset)
    lines, count, length = list[bytes](), 0, 0
    for record, end in _array_records(path, text, offset):
        lines.append(record)
        count, length = count + 1, length + len(record)
        if length >= size:
            yield Piece(b"\n".join([*lines, b""]), count, end, end if text is raw else raw.tell())
            lines, count, length = [], 0, 0
        offset = end
    if lines:
        yield Piece(b"\n".join([*lines, b""]), count, offset, offset if text is raw else raw.tell())


def _array_records(path: Path, text: IO[bytes], offset: int) -> Iterator[tuple[bytes, int]]:
    """Each record as one line without its end, and the offset behind it."""
    decode, parse = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
    buffer, at, is_end = "", 0, False
    if offset == 0:  # the opening bracket
        buffer = decode(text.read(_BLOCK))
        at = buffer.index("[") + 1
        offset = len(buffer[:at].encode("utf-8"))
    while True:
        blank = _BETWEEN.match(buffer, at)
        assert blank is not None, "it also matches an empty string"
        offset, at = offset + blank.end() - at, blank.end()
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + decode(text.read(_BLOCK))).strip():
                raise ValueError(f"{path}: text follows the JSON array; write one array, or one object on each line")
            return
        try:
            if at == len(buffer):
                raise ValueError("it ends before the closing bracket")
            _, end = parse(buffer, at)
            if end == len(buffer) and not is_end:
                raise ValueError("the value may continue after this block")
        except (ValueError, RecursionError) as error:
            data = b"" if is_end or len(buffer) - at > MOST_RECORD else text.read(_BLOCK)
            if not data and is_end:
                raise ValueError(f"{path}: not a JSON array after byte {offset:,} ({cut(str(error))})") from error
            is_end = not data
            buffer, at = buffer[at:] + decode(data, is_end), 0
            continue
        record = buffer[at:end].encode("utf-8", errors="surrogatepass")
        offset, at = offset + len(record), end
        yield record.replace(b"\n", b" ").replace(b"\r", b" "), offset


def _table_pieces(path: Path, container: Container, offset: int, size: int) -> Iterator[Piece]:
    """Records of a Parquet or Arrow file, each as JSON. The offset counts records.

    All records of a table have every field of a struct, so a null field equals an absent one and is left out: a chat
    template would write it, in arguments of tool calls and in lists of tools.
    """
    lines, length, total = list[bytes](), 0, path.stat().st_size
    for values, record, done in _table_records(path, container, offset):
        text = json.dumps(_without_null_fields(values), ensure_ascii=False, default=_as_json)
        line = text.encode("utf-8", errors="surrogatepass")
        lines.append(line)
        length += len(line)
        if length >= size:
            yield Piece(b"\n".join([*lines, b""]), len(lines), record, min(done, total))
            lines, length = [], 0
        offset = record
    if lines:
        yield Piece(b"\n".join([*lines, b""]), len(lines), offset, total)


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null_fields(inner) for name, inner in value.items() if inner is not None}
    return [_without_null_fields(inner) for inner in value] if isinstance(value, list) else value


def _as_json(value: object) -> str | None:
    """A value that JSON does not have: bytes as the text that they are, or null; a time or a decimal as it prints."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _table_records(path: Path, container: Container, start: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Each record from `start` on, the number behind it, and the bytes of the file read so far."""
    size = path.stat().st_size
    batches = _parquet_batches(path, start) if container == "parquet" else _arrow_batches(path)
    for number, batch, share in batches:
        for first in range(max(0, start - number), batch.num_rows, BATCH_RECORDS):
            part = batch.slice(first, BATCH_RECORDS).to_pylist()
            for record, values in enumerate(part, start=number + first + 1):
                yield values, record, int(share * size)


def _parquet_batches(path: Path, start: int) -> Iterator[tuple[int, Any, float]]:
    """Batches with the number of records before them and the share of the file read so far.

    Row groups that end before `start` are not read.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    total, number, groups = file.metadata.num_rows, 0, list[int]()
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if not groups and number + rows <= start:
            number += rows
        else:
            groups.append(group)
    for batch in file.iter_batches(batch_size=BATCH_RECORDS, row_groups=groups):
        yield number, batch, (number + batch.num_rows) / total
        number += batch.num_rows


def _arrow_batches(path: Path) -> Iterator[tuple[int, Any, float]]:
    """The same of an Arrow IPC file or stream, memory-mapped: batches that are skipped are not read."""
    library = pyarrow(path)
    source, number = library.memory_map(str(path)), 0
    if _head(path).startswith(b"ARROW1"):
        file = library.ipc.open_file(source)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            yield number, batch, (index + 1) / file.num_record_batches
            number += batch.num_rows
        return
    for batch in library.ipc.open_stream(source):
        yield number, batch, source.tell() / max(source.size(), 1)
        number += batch.num_rows
