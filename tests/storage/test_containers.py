"""Containers: the same records from each, from any piece on, damage in one line, and libraries that may be absent."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_sfr.storage.containers import Piece, read_pieces
from megatron_sfr.storage.jsonl import Position, read_chunks, read_records
from megatron_sfr.storage.user_files import read_json

RECORDS = [{"id": i, "text": f'line {i}\nof é 雪 "quoted" [{"{"} ' * (i % 5), "more": [{"a": "b"}]} for i in range(40)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()


def in_two_members(data: bytes) -> bytes:
    return gzip.compress(data[:301]) + gzip.compress(data[301:])


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    frames = (data[:301], data[301:])
    return b"".join(pyarrow.Codec("zstd").compress(frame, asbytes=True) for frame in frames)


def table(form: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows, sink = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    if form == "parquet":
        parquet.write_table(rows, sink, row_group_size=7)
        return sink.getvalue()
    make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with make(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=9)
    return sink.getvalue()


CONTAINERS: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: LINES,
    "jsonl.gz": lambda: in_two_members(LINES),
    "jsonl.zst": lambda: zstd(LINES),
    "json": lambda: b"\xef\xbb\xbf \n" + ARRAY + b"\n",
    "json.gz": lambda: gzip.compress(ARRAY),
    "json.zst": lambda: zstd(ARRAY),
    "parquet": lambda: table("parquet"),
    "arrow file": lambda: table("file"),
    "arrow stream": lambda: table("stream"),
}


def values(pieces: list[Piece]) -> list[dict]:
    return [json.loads(line) for piece in pieces for line in piece.text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_each_container_gives_the_same_records_from_any_piece_on(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "data"  # the name does not matter
    path.write_bytes(CONTAINERS[name]())

    pieces = list(read_pieces(path, size=size))

    assert values(pieces) == RECORDS
    assert sum(piece.records for piece in pieces) == len(RECORDS)
    assert all(piece.text.count(b"\n") == piece.records for piece in pieces)
    assert len(pieces) == (len(RECORDS) if size == 1 else len(pieces))
    assert all(first.done <= second.done for first, second in pairwise(pieces))
    assert 0 < pieces[-1].done <= path.stat().st_size
    for i in range(0, len(pieces), max(1, len(pieces) // 4)):
        later = list(read_pieces(path, pieces[i].offset, size))
        assert [(piece.text, piece.offset) for piece in later] == [(p.text, p.offset) for p in pieces[i + 1 :]]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_a_file_of_one_record_is_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "data").write_bytes(pack(b'{"id": 1}\n'))
    assert values(list(read_pieces(tmp_path / "data"))) == [{"id": 1}]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"PK\x03\x04", "zip"),
        (lzma.compress(LINES), "xz"),
        (bz2.compress(LINES), "bzip2"),
        (gzip.compress(gzip.compress(LINES)), "gzip"),
    ],
)
def test_other_archives_are_named(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / "data").write_bytes(data)
    with pytest.raises(ValueError, match=rf"data holds {name} data where text is expected; unpack it"):
        list(read_pieces(tmp_path / "data"))


def test_what_cannot_be_read_twice_is_named(tmp_path: Path) -> None:
    """A pipe, as of a shell's <(...), would lose its first bytes, or wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{path} is not a regular file; write the records to one"):
            list(read_pieces(path))


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    """The memory of this process is a file whose first page cannot be read."""
    path = tmp_path / "data.json"
    path.symlink_to("/proc/self/mem")
    for read in (lambda: list(read_pieces(path)), lambda: read_json(path)):
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            read()


def test_chunks_run_through_files_of_different_containers(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.gz"]
    for path, data in zip(paths, (LINES, ARRAY, gzip.compress(LINES)), strict=True):
        path.write_bytes(data)
    chunks = list(read_chunks(paths, Position(), 500))
    records = [record for chunk in chunks for record in chunk.records()]
    assert [(record.source, record.line) for record in records] == [
        (str(path), n) for path in paths for n in range(1, 41)
    ]
    assert [json.loads(record.text) for record in records] == RECORDS * 3
    for i in (0, len(chunks) // 2, len(chunks) - 1):
        assert list(read_chunks(paths, chunks[i].end, 500)) == chunks[i + 1 :]


def test_a_line_that_holds_a_list_is_still_a_line(tmp_path: Path) -> None:
    (tmp_path / "records").write_bytes(b'[1, 2]\n{"a": 1}\n')
    assert [record.text for record in read_records(tmp_path / "records")] == [b"[1, 2]\n", b'{"a": 1}\n']


@pytest.mark.parametrize("name", ["jsonl.gz", "json", "json.gz", "parquet", "arrow file"])
def test_a_file_that_was_cut_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(CONTAINERS[name]()[:-20])
    with pytest.raises(ValueError, match=r"data.*(damaged|not a JSON array|not a readable)") as caught:
        list(read_pieces(path, size=300))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}, {"a" 2}]', '[{"a": 1}]\n[{"a": 2}]', '[{"a": 1}, nothing]', '[{"a": 1},\u00a0{"a": 2}]'],
)
def test_what_is_not_one_json_array_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json: (not a JSON array after byte|text follows the JSON array)"):
        list(read_pieces(tmp_path / "data.json"))


@pytest.mark.parametrize("magic", [b"PAR1", b"ARROW1\0\0", b"\x28\xb5\x2f\xfd"])
def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: bytes) -> None:
    (tmp_path / "data").write_bytes(magic + bytes(40))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"data is read by pyarrow, .* run: pip install 'megatron-sfr\[datasets\]'$"):
        list(read_pieces(tmp_path / "data"))
