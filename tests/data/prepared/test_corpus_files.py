"""Our reader and writer of Megatron's indexed datasets agree with upstream's, byte by byte and token by token."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder, _IndexWriter

from megatron_sfr.data.prepared.corpus_files import Corpus, token_dtype, write_index


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # upstream warns where it has to guess it


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 200_000])
def test_upstream_reads_what_is_written_and_we_read_what_upstream_writes(tmp_path: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype is DType.optimal_dtype(vocab_size)
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, n).astype(dtype) for n in (3, 0, 17, 1, 250)]
    lengths = np.array([len(tokens) for tokens in documents], np.int32)

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with _IndexWriter(str(tmp_path / "index"), dtype) as index:
        index.write(lengths, None, np.arange(len(lengths) + 1))
    np.concatenate(documents).tofile(tmp_path / "ours.bin")
    write_index(tmp_path / "ours.idx", lengths, dtype)

    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "index").read_bytes()
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    ours, theirs = Corpus(str(tmp_path / "theirs")), IndexedDataset(str(tmp_path / "ours"))
    assert ours.dtype == theirs.index.dtype == dtype
    assert ours.sequence_lengths.tolist() == theirs.sequence_lengths.tolist() == lengths.tolist()
    assert len(ours) == len(documents)
    for i, tokens in enumerate(documents):
        assert ours[i].tolist() == theirs[i].tolist() == tokens.tolist()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.bin or \S+c\.idx is missing; give the path without its extension"):
        Corpus(str(tmp_path / "c"))
