"""`prepare` on other inputs: containers, folders, saved datasets and formats give the same bytes as plain JSONL."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sfr.cli import main
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.corpus_files import write_index
from megatron_sfr.storage.jsonl import Position, read_records
from tests.data.records import HORIZONS, RECORDS, files_of, turns, write_records

OPTIONS = PrepareOptions(200, 4, HORIZONS, 4)
MANY = RECORDS * 5


def data_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name != "manifest.json"}


@pytest.fixture
def expected(tmp_path: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    records = write_records(tmp_path / "plain.jsonl", MANY)
    prepare([records], tmp_path / "expected", tokenizer_folder, OPTIONS, progress=False)
    return data_of(tmp_path / "expected")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(MANY, indent=1))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in MANY).encode()))


def write_folder(path: Path) -> None:
    path.mkdir()
    for shard in range(3):
        write_records(path / f"{shard}.jsonl", MANY[shard * 7 : shard * 7 + 7])


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(MANY), path, row_group_size=3)


def write_saved(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dill, with which it makes its fingerprints
        datasets.Dataset.from_list(MANY).save_to_disk(path)


@pytest.mark.parametrize("write", [write_json, write_gzip, write_folder, write_parquet, write_saved])
def test_any_container_gives_the_same_folder_and_resumes(
    tmp_path: Path, tokenizer_folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture, write: Any
) -> None:
    source = tmp_path / "input"
    write(source)
    prepare([source], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
    assert data_of(tmp_path / "out") == expected

    # A bad record in a last file stops a run; skipping it resumes after the chunks that were written.
    bad = write_records(tmp_path / "bad.jsonl", [{"messages": []}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no messages"):
        prepare([source, bad], tmp_path / "more", tokenizer_folder, OPTIONS, progress=False, chunk_bytes=300)
    capsys.readouterr()
    skip = PrepareOptions(200, 4, HORIZONS, 4, skip_bad_rows=True)
    prepare([source, bad], tmp_path / "more", tokenizer_folder, skip, chunk_bytes=300)
    assert "resumes at" in capsys.readouterr().out
    assert {name: data for name, data in data_of(tmp_path / "more").items() if name != "rejected.jsonl"} == expected


def test_what_a_table_adds_to_a_record_is_left_out(tmp_path: Path) -> None:
    """Null fields, which a table gives to all of its structs, and bytes for text."""
    pyarrow = pytest.importorskip("pyarrow")
    calls = [{"function": {"name": name, "arguments": {name: "x"}}} for name in ("at", "of")]
    records = [{"tools": [call], "note": {"text": b"the sea", "image": b"\xff"}} for call in calls]
    table = pyarrow.Table.from_pylist([record | {"list": [None, 1]} for record in records])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "table")

    found = [json.loads(record.text) for record in read_records(tmp_path / "table")]

    assert [record["tools"] for record in found] == [[call] for call in calls]
    assert found[0]["note"]["text"] == "the sea"
    assert found[0]["note"]["image"] is None
    assert found[0]["list"] == [None, 1]


def test_a_bad_record_of_an_array_is_named_by_its_number(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([*RECORDS, {"messages": []}], indent=2))
    with pytest.raises(ValueError, match=r"records\.json:5: no messages"):
        prepare([path], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False, workers=2, chunk_bytes=100)


def test_texts_come_from_arrays_and_folders_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = [{"text": f"the sea is blue {i}"} for i in range(9)]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(records[:4]))
    write_records(folder / "b.jsonl", records[4:])
    plain = write_records(tmp_path / "plain.jsonl", records)
    options = DocumentOptions(stride=2, min_segment_length=2)
    for source, output in ((folder, "a"), (plain, "b")):
        assert prepare([source], tmp_path / output, tokenizer_folder, options, progress=False).documents == 9
    assert data_of(tmp_path / "a") == data_of(tmp_path / "b")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "the sea", "completion": "is blue"},
        {"prompt": turns("the sea"), "completion": [{"role": "assistant", "content": "is blue"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "the "}, "sea"]}, turns("", "is blue")[1]]},
        {"instruction": "the sea", "output": "is blue"},
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_formats_of_peers_are_the_same_conversation(
    tmp_path: Path, tokenizer_folder: Path, record: dict, system: str | None
) -> None:
    messages = turns("the sea", "is blue")
    if system is not None:
        plain = {"messages": [{"role": "system", "content": system}, *messages]}
        if "messages" in record:
            record = {"messages": [{"role": "developer", "content": system}, *record["messages"]]}
        else:
            record = record | {"system": system}
    else:
        plain = {"messages": messages}
    tokens = []
    for name, fields in (("a", plain), ("b", record)):
        path = write_records(tmp_path / f"{name}.jsonl", [fields])
        prepare([path], tmp_path / name, tokenizer_folder, OPTIONS, progress=False)
        tokens.append(PreparedData.open(tmp_path / name)[0])
    assert tokens[0].tokens.tolist() == tokens[1].tokens.tolist()
    assert tokens[0].loss_mask.tolist() == tokens[1].loss_mask.tolist()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": 3, "completion": "b"}, "the prompt is not text; write"),
        ({"prompt": "a", "completion": []}, "the completion is not text; write"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, turns("", "b")[1]]},
            "message 1 has content of type 'image_url'; only text can be trained on",
        ),
    ],
)
def test_what_is_not_text_is_a_bad_record(tmp_path: Path, tokenizer_folder: Path, record: dict, reason: str) -> None:
    path = write_records(tmp_path / "records.jsonl", [record])
    with pytest.raises(ValueError, match=f":1: {reason}"):
        prepare([path], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)


def test_the_commands_name_an_invalid_input(tmp_path: Path, tokenizer_folder: Path, capsys) -> None:
    how = ["--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out")]
    for command in ("prepare", "prepare-text"):
        assert main([command, "--input", str(tmp_path / "none"), *how]) == 2
        assert "none does not exist; give a file, a folder, or the name of a dataset" in capsys.readouterr().err
    records = write_records(tmp_path / "records.jsonl", RECORDS)
    assert main(["prepare", "--input", str(records), "--split", "train", *how]) == 2
    assert "no input is one; leave them out" in capsys.readouterr().err


def test_an_indexed_corpus_is_read_in_chunks_of_the_given_bytes(tmp_path: Path) -> None:
    """Of 10 tokens of two bytes in four documents. More workers than chunks are not started."""
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "corpus.bin")
    write_index(tmp_path / "corpus.idx", np.array([3, 0, 5, 2], np.int32), np.uint16)
    source = DocumentOptions().source([tmp_path / "corpus"])
    assert source.total == 20
    assert [(x.first, x.last, x.end.done) for x in source.chunks(Position(), 8)] == [(0, 3, 16), (3, 4, 20)]
