"""Damage in prepared data and target stores is found, in one line that names the file."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr import cli
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import DTYPES, PreparedData
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.targets.fill import StoreWriter
from megatron_sfr.storage.integrity import check_offsets, check_sample
from tests.data.records import write_records
from tests.data.stores import flip, open_store, run, write_prepared


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # upstream warns where it has to guess it


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    """Damages one bit of a file while the block runs."""
    flip(path, path.stat().st_size // 2)
    yield
    flip(path, path.stat().st_size // 2)


def write_documents(folder: Path, tokenizer: Path) -> Path:
    """FOLDER/documents, and FOLDER/again of the same corpus where it stands."""
    records = write_records(folder / "texts.jsonl", [{"text": "the sea is blue and the sky is grey " * 4}] * 3)
    options = DocumentOptions(stride=4, horizons=((1, 12),), min_segment_length=4)
    prepare([records], folder / "documents", tokenizer, options, progress=False)
    corpus = folder / "documents" / "documents"
    prepare([corpus], folder / "again", tokenizer, options, progress=False)
    return folder / "documents"


def test_a_flipped_bit_is_found_at_the_start_of_a_run_and_by_inspect(
    prepared: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in DTYPES:
        PreparedData.open(prepared).check()
        assert cli.main(["inspect", "--data", str(prepared), "--verify"]) == 0
        assert "every file is as it was written" in capsys.readouterr().out
        with flipped(prepared / name):
            with pytest.raises(ValueError, match=f"{re.escape(name)} is .*; run: megatron-sfr prepare"):
                PreparedData.open(prepared).check()
            assert cli.main(["inspect", "--data", str(prepared), "--verify"]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["offsets.bin", "anchor_offsets.bin", "personas.bin", "anchors.bin"])
@pytest.mark.parametrize("value", [-1, 2**31 - 1])
def test_numbers_that_point_outside_are_one_line_where_a_sample_is_read(prepared: Path, name: str, value: int) -> None:
    values = np.fromfile(prepared / name, DTYPES[name])
    values[1] = value
    values.tofile(prepared / name)
    data = PreparedData.open(prepared)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged: .*; run: megatron-sfr prepare"):
        [data[i] for i in range(len(data))]


@pytest.mark.parametrize("key", ["samples", "tokens", "anchors", "segments"])
def test_counts_that_contradict_the_files_are_refused(prepared: Path, key: str) -> None:
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {key: manifest[key] + 1}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .* counts mean"):
        PreparedData.open(prepared)


def test_offsets_that_fall_are_refused() -> None:
    check_offsets(Path("offsets.bin"), np.array([0, 3, 3, 7]), 7)
    with pytest.raises(ValueError, match="offset 2 is less than the one before it"):
        check_offsets(Path("offsets.bin"), np.array([0, 5, 3, 7]), 7)
    with pytest.raises(ValueError, match="run from 0 to 7, not from 0 to 8"):
        check_offsets(Path("offsets.bin"), np.array([0, 5, 7]), 8)


def test_the_sample_of_checksums_keeps_within_its_budget(prepared: Path) -> None:
    files = PreparedData.open(prepared).manifest.files
    sizes = sorted(record["bytes"] for record in files.values())
    assert len(check_sample(prepared, files, budget=sum(sizes[:3]))) == 3
    assert len(check_sample(prepared, files)) == len(files)


def test_a_flipped_bit_in_documents_is_found(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = write_documents(tmp_path, tokenizer_folder)
    for folder in (documents, tmp_path / "again"):  # which reads the first one's corpus
        for path in (documents / "documents.bin", documents / "documents.idx"):
            assert_a_flipped_bit_is_found(folder, path)
        for name in ("anchors.bin", "anchor_offsets.bin"):
            assert_a_flipped_bit_is_found(folder, folder / name)


def assert_a_flipped_bit_is_found(folder: Path, path: Path) -> None:
    PreparedDocuments.open(folder).check()
    said = f"{re.escape(path.name)} is .*; run: megatron-sfr prepare-text"
    with flipped(path), pytest.raises(ValueError, match=said):
        PreparedDocuments.open(folder).check()


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = write_documents(tmp_path, tokenizer_folder) / "documents"
    (tmp_path / "copy.idx").write_bytes(corpus.with_suffix(".idx").read_bytes())
    tokens = np.fromfile(corpus.with_suffix(".bin"), np.uint16)
    tokens[3] = 60_000
    tokens.tofile(tmp_path / "copy.bin")
    options = DocumentOptions(stride=4, horizons=((1, 12),), min_segment_length=4)
    with pytest.raises(ValueError, match=r"copy\.bin: document 0 has token ids from \d+ to 60000, the tokenizer has"):
        prepare([tmp_path / "copy"], tmp_path / "out", tokenizer_folder, options, progress=False)


def test_anchors_of_documents_that_point_outside_are_one_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = write_documents(tmp_path, tokenizer_folder)
    anchors = np.fromfile(documents / "anchors.bin", np.int32)
    anchors[1] = 10**6  # the first anchor's segment
    anchors.tofile(documents / "anchors.bin")
    with pytest.raises(ValueError, match=r"anchors\.bin is damaged: an anchor of document 0 is out of range"):
        PreparedDocuments.open(documents).anchors(0)


@pytest.mark.parametrize("verify", [False, True])
def test_embed_pairs_no_vector_with_a_text_that_was_not_prepared(
    tmp_path: Path, tokenizer_folder: Path, encoded: list[str], verify: bool
) -> None:
    prepared = write_prepared(tmp_path, tokenizer_folder)
    if verify:
        run(prepared)
        encoded.clear()
    flip(prepared / "segments.jsonl", 3)
    with pytest.raises(ValueError, match=r"segments\.jsonl is not what was written .*; run: megatron-sfr prepare"):
        run(prepared, verify=verify)
    assert encoded == []


def test_online_targets_are_not_made_of_another_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    prepared = write_prepared(tmp_path, tokenizer_folder)
    run(prepared, later=True)
    flip(prepared / "segments.jsonl", 3)
    with (
        StoreWriter(prepared / "targets", PreparedData.open(prepared)) as filling,
        pytest.raises(ValueError, match=r"segments\.jsonl is damaged: segment 0 is not the text that was prepared"),
    ):
        filling.fill(0, None)  # type: ignore[arg-type]  # no encoder is reached


def test_a_store_that_is_still_to_be_filled_is_not_damaged(tmp_path: Path, tokenizer_folder: Path) -> None:
    prepared = write_prepared(tmp_path, tokenizer_folder)
    store = run(prepared, later=True)
    open_store(store, prepared, partial=True).verify()
