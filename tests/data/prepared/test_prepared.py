"""Prepared folders: samples are read back as written; incomplete and changed folders are refused."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.chat.conversation import encode, read_conversations
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare import pipeline
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import DTYPES, PreparedData
from megatron_sfr.data.segments.anchors import Cut, futures, text_digest
from megatron_sfr.storage.manifest import staging
from tests.data.records import HORIZONS, OPTIONS, RECORDS, files_of, turns, write_records


def test_samples_come_back_as_they_were_encoded(prepared: Path, tokenizer_folder: Path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    data = PreparedData.open(prepared)

    for index, conversation in enumerate(read_conversations(prepared.parent / "records.jsonl")):
        encoded, sample = encode(conversation, tokenizer), data[index]
        assert (sample.tokens == encoded.tokens).all()
        assert (sample.loss_mask == encoded.loss_mask).all()
        assert sample.persona == (conversation.persona or "")
        anchors = sample.anchors
        found = list(futures(encoded.tokens, encoded.replies, tokenizer, Cut(4, HORIZONS, 4)))
        segments = [segment for segment, _ in found]
        assert anchors.position.tolist() == [s.position for s in segments]
        assert anchors.response.tolist() == [s.response for s in segments]
        assert anchors.ordinal.tolist() == [s.ordinal for s in segments]
        assert anchors.length.tolist() == [s.length for s in segments]
        assert anchors.horizon.tolist() == [s.horizon for s in segments]
        assert [data.texts[row] for row in anchors.segment] == [text for _, text in found]
        assert (sample.loss_mask[anchors.position + 1] == 1).all()
    assert len(data) == len(RECORDS)
    with pytest.raises(IndexError):
        data[len(RECORDS)]


def test_the_manifest_counts_what_is_there(prepared: Path, tokenizer_folder: Path):
    data = PreparedData.open(prepared)
    samples = [data[i] for i in range(len(data))]
    manifest = data.manifest

    assert manifest.tokens == sum(len(s.tokens) for s in samples)
    assert manifest.supervised_tokens == sum(int(s.loss_mask.sum()) for s in samples)
    assert manifest.anchors == sum(len(s.anchors.position) for s in samples)
    assert manifest.max_anchors == max(len(s.anchors.position) for s in samples)
    assert manifest.max_response_tokens == max(int(s.loss_mask.sum()) for s in samples) == int(data[1].loss_mask.sum())
    assert manifest.horizons == [list(horizon) for horizon in HORIZONS]
    assert manifest.personas == {"calm": 2, "wild": 1, "": 1}
    assert manifest.vocab_size == len(load_tokenizer(str(tokenizer_folder)))
    assert (manifest.samples, manifest.rejected) == (4, 0)


def test_the_token_that_ends_replies_is_recorded_and_printed_if_engines_would_not_stop(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture
):
    records = write_records(tmp_path / "records.jsonl", RECORDS)
    base = shutil.copytree(tokenizer_folder, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    end = load_tokenizer(str(base)).convert_tokens_to_ids("<|im_end|>")
    for folder, output in ((tokenizer_folder, "a"), (base, "b"), (base, "b")):  # the last one is up to date
        assert prepare([records], tmp_path / output, folder, OPTIONS).reply_end_tokens == [end]
        said = (
            "replies end on <|im_end|>, which is not the tokenizer's eos_token (<|endoftext|>)"
            in capsys.readouterr().out
        )
        assert said is (folder is base)


def test_equal_segments_are_stored_once(prepared: Path):
    data = PreparedData.open(prepared)
    texts = [data.texts[row] for row in range(data.manifest.segments)]
    digests = b"".join(text_digest(text) for text in texts)
    assert (prepared / "segment_digests.bin").read_bytes() == digests

    assert len(set(texts)) == len(texts)
    assert (data[0].anchors.segment == data[2].anchors.segment).all(), "one reply under two prompts"
    assert len(data[0].anchors.segment) > 1
    with pytest.raises(IndexError):
        data.texts[len(texts)]


def test_a_reply_that_is_too_short_has_no_anchor(prepared: Path):
    assert len(PreparedData.open(prepared)[3].anchors.position) == 0


def test_data_without_any_anchor_can_be_read(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", [{"messages": turns("the sea", "no")}])
    manifest = prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)

    assert (manifest.anchors, manifest.max_anchors, manifest.segments) == (0, 0, 0)
    assert len(PreparedData.open(tmp_path / "out")[0].anchors.position) == 0


def test_opens_again_in_another_process(prepared: Path):
    data = PreparedData.open(prepared)
    dumped = pickle.dumps(data)

    assert len(dumped) < 1000, "the folder's name, not its content"
    assert (pickle.loads(dumped)[1].tokens == data[1].tokens).all()


def test_two_runs_are_equal_and_the_second_does_nothing(prepared: Path, tokenizer_folder: Path, monkeypatch):
    records, before = prepared.parent / "records.jsonl", files_of(prepared)
    again = prepared.parent / "again"
    prepare([records], again, tokenizer_folder, OPTIONS, progress=False)
    assert files_of(again) == before

    moved = records.rename(records.with_name("moved.jsonl"))
    monkeypatch.setattr(pipeline, "staging", None)  # nothing is written
    assert prepare([moved], prepared, tokenizer_folder, OPTIONS, progress=False).samples == 4


def test_other_content_is_replaced_only_by_force(prepared: Path, make_tokenizer, tokenizer_folder: Path):
    records = write_records(prepared.parent / "other.jsonl", RECORDS[:2])
    before = files_of(prepared)
    (prepared / "targets").mkdir()
    template = (tokenizer_folder / "chat_template.jinja").read_text() + "\n"
    longer = PrepareOptions(seq_length=300, stride=5, horizons=HORIZONS, min_segment_length=4)
    changes = [
        (records, tokenizer_folder, OPTIONS, "inputs"),
        (prepared.parent / "records.jsonl", make_tokenizer(template), OPTIONS, "tokenizer_sha256"),
        (prepared.parent / "records.jsonl", tokenizer_folder, longer, "seq_length, stride"),
        (prepared.parent / "records.jsonl", tokenizer_folder, replace(OPTIONS, too_long="truncate"), "too_long"),
        (prepared.parent / "records.jsonl", tokenizer_folder, replace(OPTIONS, persona_key="style"), "persona_key"),
        (prepared.parent / "records.jsonl", tokenizer_folder, PrepareOptions(200, 4, HORIZONS[:2], 4), "horizons"),
    ]
    for path, tokenizer, options, what in changes:
        with pytest.raises(ValueError, match=f"prepared with other values of {what}; .*--force"):
            prepare([path], prepared, tokenizer, options, progress=False)
        assert files_of(prepared) == before

    (prepared / "rejected.jsonl").write_text("of an earlier run")
    assert prepare([records], prepared, tokenizer_folder, OPTIONS, force=True, progress=False).samples == 2
    assert len(PreparedData.open(prepared)) == 2
    assert (prepared / "targets").is_dir()
    assert not (prepared / "rejected.jsonl").exists()


@pytest.mark.parametrize("name", [*DTYPES, "manifest.json"])
def test_a_folder_with_a_file_that_is_cut_or_missing_is_refused(prepared: Path, name: str):
    path = prepared / name
    content = path.read_bytes()

    path.write_bytes(content[:-1] if name != "manifest.json" else content[:-2])
    with pytest.raises(ValueError, match=f"{re.escape(name)} .*; run: megatron-sfr prepare .*--output"):
        PreparedData.open(prepared)
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*; run: megatron-sfr prepare .*--output"):
        PreparedData.open(prepared)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 99}, "is of version 99, this program reads version 3; run: megatron-sfr prepare .*--force"),
        ({"version": 2}, "is of version 2, this program reads version 3; run: megatron-sfr prepare .*--force"),
        ({"kind": "a target store"}, "holds a target store, not prepared data"),
        ({"extra": 1}, "is damaged"),
    ],
)
def test_another_kind_or_version_is_refused(prepared: Path, change: dict, reason: str):
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ValueError, match=reason):
        PreparedData.open(prepared)


def test_a_missing_folder_and_one_of_someone_else_are_refused(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", RECORDS)
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr prepare"):
        PreparedData.open(tmp_path / "none")
    with pytest.raises(ValueError, match="is not empty and is not a prepared folder"):
        prepare([records], tmp_path, tokenizer_folder, OPTIONS, force=True, progress=False)
    with pytest.raises(ValueError, match="is a file"):
        prepare([records], records, tokenizer_folder, OPTIONS, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]


def test_a_folder_that_lost_its_manifest_is_written_again(prepared: Path, tokenizer_folder: Path):
    before = files_of(prepared)
    (prepared / "manifest.json").unlink()

    prepare([prepared.parent / "records.jsonl"], prepared, tokenizer_folder, OPTIONS, progress=False)

    assert files_of(prepared) == before


def test_only_one_process_writes_a_folder(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", RECORDS)
    with staging(tmp_path / "out", keep=False) as folder:
        with pytest.raises(ValueError, match=r"out is being written by process \d+ on .* since "):
            prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS, progress=False)
        assert folder.is_dir()
        shutil.rmtree(folder)


def test_what_a_killed_run_left_is_cleared(prepared: Path, tokenizer_folder: Path):
    before = files_of(prepared)
    shutil.rmtree(prepared)
    left = prepared.parent / ".out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")

    prepare([prepared.parent / "records.jsonl"], prepared, tokenizer_folder, OPTIONS, progress=False)

    assert files_of(prepared) == before
    assert not left.exists()


def test_arrays_can_be_written_to_without_changing_the_files(prepared: Path):
    data = PreparedData.open(prepared)
    before = data[0].tokens.copy()
    data[0].tokens[:] = 0
    data[0].anchors.position[:] = 0

    assert (data[0].tokens == before).all()
    assert data[0].tokens.dtype == data[0].anchors.segment.dtype == np.int32
    assert data[0].loss_mask.dtype == np.uint8
