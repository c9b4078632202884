"""Embeddings with checksums: intact ones are read back, missing and damaged ones are found by their index."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.targets.vectors import CHECKSUMS, VECTORS, Embeddings, EmbeddingWriter

DIM = 6


def filled(folder: Path, rows: np.ndarray, total: int = 5000) -> np.ndarray:
    """Writes `rows` of `total` and returns the vectors of all, 0 where nothing was written."""
    vectors = np.zeros((total, DIM), np.float16)
    vectors[rows] = np.random.default_rng(0).standard_normal((len(rows), DIM))
    with EmbeddingWriter(folder, total, DIM) as writer:
        writer.write(rows, vectors[rows])
        writer.sync()
    return vectors


def test_rows_are_read_back_and_those_not_written_are_missing(tmp_path: Path):
    written = np.random.default_rng(1).permutation(5000)[:3000]
    expected = filled(tmp_path, written)
    rows = Embeddings(tmp_path, DIM)
    asked = np.array([4999, 0, 17, 17, *written[:5]])

    vectors, good = rows.read(asked)
    assert vectors.dtype == np.float16
    assert (vectors == expected[asked]).all()
    assert (good == np.isin(asked, written)).all()
    assert rows.missing().tolist() == sorted(set(range(5000)) - set(written.tolist()))
    assert rows.begun(slice(0, 5000)).sum() == 3000
    assert [array.shape for array in rows.read(np.array([], int))] == [(0, DIM), (0,)]


@pytest.mark.parametrize("name", [VECTORS, CHECKSUMS])
def test_every_flipped_bit_costs_its_row_and_no_other(tmp_path: Path, name: str):
    filled(tmp_path, np.arange(3), total=3)
    content = (tmp_path / name).read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(changed)
        assert Embeddings(tmp_path, DIM).missing().tolist() == [3 * bit // (8 * len(content))]


def test_a_row_whose_crc_is_0_counts_as_there(tmp_path: Path):
    # zlib.crc32(...) == 0 for these 4 bytes, the classical fixed point of CRC-32.
    vector = np.frombuffer(b"\x9d\x0a\xd9\x6d", np.float16)[None]
    with EmbeddingWriter(tmp_path, 1, 2) as writer:
        writer.write(np.array([0]), vector)

    assert np.fromfile(tmp_path / CHECKSUMS, np.uint32) == 1
    assert len(Embeddings(tmp_path, 2).missing()) == 0


def test_what_is_written_is_seen_by_those_who_have_it_open(tmp_path: Path):
    filled(tmp_path, np.arange(10))
    rows = Embeddings(tmp_path, DIM)
    assert not rows.read(np.array([10]))[1].any()
    with EmbeddingWriter(tmp_path, 5000, DIM) as writer:
        writer.write(np.array([10]), np.ones((1, DIM), np.float16))
    vectors, good = rows.read(np.array([10, 9]))
    assert good.all()
    assert (vectors[0] == 1).all()


def test_a_disk_too_small_is_found_before_any_row(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"vectors.bin needs 2,000,000.0 GB and its disk has [\d.]+ GB left; make room"
    ):
        EmbeddingWriter(tmp_path, 10**12, 1000)  # 2 PB: more than the file system could hold, were it tried
    assert (tmp_path / VECTORS).stat().st_size == 0
