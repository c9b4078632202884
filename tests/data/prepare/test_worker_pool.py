"""Workers: results in order and few at a time, byte-identical folders, errors in one line, no process left behind."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import psutil
import pytest

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepare.worker_pool import AHEAD, ordered_map
from megatron_sfr.storage.jsonl import Position, read_chunks, read_records
from tests.data.records import HORIZONS, RECORDS, files_of, turns, write_records


def slow_square(number: int) -> int:
    time.sleep(0.05 * (number % 3 == 0))
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), 9)
    return number


def test_results_are_in_order_and_reading_ahead_is_bounded():
    taken, before = [], set(psutil.Process().children())

    def numbers() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    with closing(ordered_map(slow_square, numbers(), 2)) as squares:
        for number in range(9):
            assert next(squares) == number * number
            assert len(taken) <= number + AHEAD * 2
    others = [child.cmdline() for child in psutil.Process().children() if child not in before]
    assert all("resource_tracker" in " ".join(line) for line in others), "the workers are gone"


def test_a_dead_worker_is_reported_in_one_line():
    with pytest.raises(
        ValueError, match=r"^a process .* ended early; .*fewer --workers than 2: the same command resumes"
    ):
        list(ordered_map(die, range(9), 2))


def refuse_odd(number: int) -> int:
    if number % 2:
        raise LookupError(f"{number} is odd")
    return number


def test_an_error_of_a_worker_is_raised_in_its_place_with_its_traceback():
    results = ordered_map(refuse_odd, [0, 2, 3, 4], 2)
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(LookupError, match=r"^3 is odd") as caught:
        next(results)
    assert "in refuse_odd" in str(caught.value.__cause__)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_chunks_are_complete_lines_and_any_chunk_can_be_the_first(tmp_path: Path, size: int, end: bytes):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\n\n" + b"two " * 9 + b"\r\nthree" + end)
    (tmp_path / "empty").touch()
    (tmp_path / "b").write_bytes(b"four\n" * 3)
    paths = [tmp_path / name for name in ("a", "empty", "b")]
    expected = [record for path in paths for record in read_records(path)]
    assert [(record.line, record.text.split()[0]) for record in expected] == [
        *((1, b"one"), (3, b"two"), (4, b"three")),
        *((1, b"four"), (2, b"four"), (3, b"four")),
    ]

    chunks = list(read_chunks(paths, Position(), size))

    assert [record for chunk in chunks for record in chunk.records()] == expected
    assert b"".join(chunk.text for chunk in chunks) == b"".join(path.read_bytes() for path in paths)
    assert chunks[-1].end == Position(2, 15, 4, sum(len(path.read_bytes()) for path in paths))
    for i, chunk in enumerate(chunks):
        assert list(read_chunks(paths, chunk.end, size)) == chunks[i + 1 :]
        assert chunk.text.endswith(b"\n") or chunk.text.endswith(b"three")


def test_the_folder_is_the_same_for_any_number_of_workers_and_any_chunk(tmp_path: Path, tokenizer_folder: Path):
    # So long that some are truncated, with repeated replies, repeated records and bad records throughout.
    records = [*RECORDS, {"persona": "new", "messages": turns("the sea", "the sky is grey " * 20)}, {"messages": []}]
    a = write_records(tmp_path / "a.jsonl", records * 30)
    b = write_records(tmp_path / "b.jsonl", [{"instruction": f"sea {i}", "output": "the sky " * i} for i in range(50)])
    options = PrepareOptions(90, 4, HORIZONS, 4, skip_bad_rows=True, too_long="truncate")

    folders = []
    for workers, chunk_bytes in ((1, 1 << 20), (3, 2000), (2, 300), (1, 1)):
        folders.append(tmp_path / f"{workers}-{chunk_bytes}")
        how = {"workers": workers, "chunk_bytes": chunk_bytes, "progress": False}
        manifest = prepare([a, b], folders[-1], tokenizer_folder, options, **how)

    assert (manifest.samples, manifest.rejected, manifest.duplicates) == (199, 31, 145)
    assert manifest.truncated > 30
    first, *others = [files_of(folder) for folder in folders]
    for other in others:
        assert other == first


def test_a_bad_record_is_named_by_its_line_for_any_number_of_workers(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", [*RECORDS * 30, {"messages": []}, *RECORDS])

    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"^\S+records\.jsonl:121: no messages; write"):
            prepare([records], tmp_path / "out", tokenizer_folder, PrepareOptions(), workers=workers, chunk_bytes=999)


def test_zero_workers_are_refused(tmp_path: Path, tokenizer_folder: Path):
    write_records(tmp_path / "records.jsonl", RECORDS)
    with pytest.raises(ValueError, match="0 workers; give at least 1"):
        prepare([tmp_path / "records.jsonl"], tmp_path / "out", tokenizer_folder, PrepareOptions(), workers=0)
