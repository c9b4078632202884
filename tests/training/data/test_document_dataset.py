"""A corpus through `prepare` and upstream's GPTDataset: positions and futures of the anchors."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from torch.utils.data import default_collate

from megatron_sfr.cli import main
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.document_source import DocumentOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.corpus_files import Corpus
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.training.data.persona_groups import Group, number_groups
from megatron_sfr.training.data.provider import DataPlan, build, dataset_config
from tests.distributed.tiny import write_prepared
from tests.training.data.test_provider import arguments

OPTIONS = DocumentOptions(stride=5, horizons=((1, 8), (9, 4)), min_segment_length=2)
LENGTH = 48
TEXTS = [
    *(
        " ".join(f"{word}{i}" for i in range(n))
        for word, n in (("sea", 3), ("grey", 40), ("", 25), ("ö", 9), ("雪", 12))
    ),
    "one",
    *(f"def f_{n}(x):\n    return x + {n}\n\n" * 3 for n in range(6)),
]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


def write_texts(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    prepare([write_texts(folder / "t.jsonl")], folder / "p", tokenizer, OPTIONS, progress=False)
    embed(folder / "p", "minilm", EmbedOptions(), progress=False)
    return folder / "p"


def document_arguments(folder: Path, **changes: Any) -> DataPlan:
    more = {"seq_length": LENGTH, "vocab_size": 400, "eod_mask_loss": False, "mmap_bin_files": True}
    return arguments([str(folder)], **more | changes)


def test_several_validation_sets_of_documents(folder: Path) -> None:
    several = {"full_validation": True, "multiple_validation_sets": True, "sfr": False}
    plan = document_arguments(folder, **several, valid_data_path=[str(folder), str(folder)])
    built = build(dataset_config(plan), [4, None, 0])
    assert number_groups(built, multiple=True) == [Group(part, "") for part in ("", "validation-0", "validation-1")]
    for number, dataset in enumerate(built[1], start=1):
        assert (dataset[0]["group"] == number).all()
        assert dataset[0]["group"].shape == dataset[0]["tokens"].shape


def test_upstream_reads_the_documents_back(folder: Path, tokenizer: Path) -> None:
    prepared, fast = open_prepared(folder), load_tokenizer(str(tokenizer))
    assert isinstance(prepared, PreparedDocuments)
    corpus = IndexedDataset(prepared.corpus)
    assert len(corpus) == len(prepared) == len(TEXTS)
    for text, tokens in zip(TEXTS, corpus, strict=True):
        assert tokens[-1] == prepared.manifest.eod == fast.eos_token_id
        assert fast.decode(tokens[:-1]) == text
    assert prepared.manifest.tokens == corpus.sequence_lengths.sum()
    prepared.verify()


def test_an_anchor_has_the_text_that_follows_it_in_its_document(folder: Path, tokenizer: Path) -> None:
    prepared, fast = PreparedDocuments.open(folder), load_tokenizer(str(tokenizer))
    corpus, seen = IndexedDataset(prepared.corpus), 0
    for document in range(len(prepared)):
        position, segment, horizon = prepared.anchors(document, 0, len(corpus[document]))
        assert (position % OPTIONS.stride == 0).all()
        assert (np.diff(position) >= 0).all()
        for i, row, h in zip(position, segment, horizon, strict=True):
            offset, length = OPTIONS.horizons[h]
            future = fast.decode(corpus[document][i + offset : i + offset + length], skip_special_tokens=True)
            if "\ufffd" not in future:  # the slice does not cut a character
                assert prepared.texts[row] == future
                seen += 1
    assert seen > 50


@pytest.mark.parametrize("separate", [False, True])
def test_sequences_are_upstreams_and_anchors_are_in_their_pieces(folder: Path, separate: bool) -> None:
    config = dataset_config(document_arguments(folder, dataloader_inter_document_masking=separate))
    train, _, _ = build(config, [40, None, None])
    prepared = PreparedDocuments.open(folder)
    store, corpus = TargetStore.open(folder / "targets", prepared), IndexedDataset(prepared.corpus)

    actual: Counter[tuple[int, int, int]] = Counter()
    tokens_seen: Counter[tuple[int, int]] = Counter()
    for idx in range(len(train)):
        item, pieces = train[idx], train.pieces(idx)
        row = np.append(item["tokens"].numpy(), item["labels"].numpy()[-1])
        joined = [corpus[d][b:e] for d, b, e in zip(pieces.document, pieces.begin, pieces.end, strict=True)]
        assert (row == np.concatenate(joined)).all()
        used = item["anchor_weight"] > 0
        assert not item["anchor_position"][~used].any()
        for number, (d, b, e, s) in enumerate(
            zip(pieces.document, pieces.begin, pieces.end, pieces.start, strict=True)
        ):
            inside = used & (item["anchor_position"] >= s) & (item["anchor_position"] < s + e - b)
            position, segment, horizon = prepared.anchors(d, b, e - 1)
            assert (item["anchor_position"][inside] == s + position - b).all()
            assert (item["anchor_horizon"][inside] == horizon).all()
            assert (item["target"][item["anchor_row"][inside]] == store[segment]).all()
            if len(position):
                np.testing.assert_allclose(item["anchor_weight"][inside], (e - b - 1) / len(position), rtol=1e-6)
            actual.update((int(d), int(i), int(h)) for i, h in zip(position, horizon, strict=True))
            tokens_seen.update((int(d), int(i)) for i in range(b, e - 1))
            if separate:
                last = min(s + e - b, LENGTH)
                assert (item["document"][s:last] == number).all()
                assert (item["position_ids"][s:last] == np.arange(last - s)).all()
        assert (item["anchor_sample"][used] == idx).all()
        assert ("document" in item) == separate
    for (d, i, _), times in actual.items():
        assert times == tokens_seen[d, i], "as often as its token is predicted from"
    default_collate([train[i] for i in range(len(train))])


def test_an_existing_indexed_dataset_is_used_in_place(tmp_path: Path, folder: Path, tokenizer: Path) -> None:
    import torch

    builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.uint16)
    for document in IndexedDataset(PreparedDocuments.open(folder).corpus):
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "corpus.idx"))
    manifest = prepare([tmp_path / "corpus"], tmp_path / "p", tokenizer, OPTIONS, progress=False)

    assert not (tmp_path / "p" / "documents.bin").exists()
    for name in ("anchors.bin", "anchor_offsets.bin", "segments.jsonl"):
        assert (tmp_path / "p" / name).read_bytes() == (folder / name).read_bytes(), name
    assert manifest.documents == len(TEXTS)
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(ValueError, match=r"corpus\.bin, the corpus of .* is missing; run: megatron-sfr prepare-text"):
        PreparedDocuments.open(tmp_path / "p")


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, folder: Path, tokenizer: Path) -> None:
    rows = write_texts(tmp_path / "t.jsonl")
    prepare([rows], tmp_path / "p", tokenizer, OPTIONS, progress=False, workers=2, chunk_bytes=200)
    for name in PreparedDocuments.open(folder).manifest.files:
        assert (tmp_path / "p" / name).read_bytes() == (folder / name).read_bytes(), name


def test_other_data_under_the_same_path_gives_other_sequences(tmp_path: Path, tokenizer: Path) -> None:
    """Upstream caches its indices by path: replaced data must not use the old ones."""
    for texts in (TEXTS[:3], TEXTS):
        rows = write_texts(tmp_path / "t.jsonl", texts)
        prepare([rows], tmp_path / "p", tokenizer, OPTIONS, progress=False, force=True)
        train, _, _ = build(dataset_config(document_arguments(tmp_path / "p", sfr=False)), [9, None, None])
        assert set(train.document_index.tolist()) == set(range(len(texts)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ('{"txt": "a"}', "no field 'text'; name the field that has the text with --text-key"),
        ('{"text": 3}', "the field 'text' is not a string"),
        ('{"text": " "}', "an empty text; remove the record"),
        ('{"text": "a <|im_end|> b"}', "the text has the control token '<|im_end|>'; remove it"),
    ],
)
def test_a_bad_record_is_reported_with_line_and_reason(tmp_path: Path, tokenizer: Path, row: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "the sea"}\n' + row + "\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:2: {re.escape(reason)}"):
        prepare([path], tmp_path / "p", tokenizer, OPTIONS, progress=False)
    skip = DocumentOptions(stride=5, min_segment_length=2, skip_bad_rows=True)
    manifest = prepare([path], tmp_path / "p", tokenizer, skip, progress=False)
    assert (manifest.documents, manifest.rejected) == (1, 1)


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, b"x", r"corpus\.idx is damaged: its header"),
        (17, b"\x09", r"corpus\.idx is damaged: its header"),  # the dtype
        (18, b"\xff" * 8, r"corpus\.idx is damaged: its header"),  # the number of documents
        (34, b"\xff\xff\xff\x7f", r"corpus\.idx is damaged, or does not belong"),  # a length
        (-4, b"\xff\xff", r"corpus\.idx is damaged, or does not belong"),  # the end of a document
        (None, b"", r"corpus\.idx is damaged: its header"),  # the end of the file is missing
    ],
)
def test_a_damaged_index_is_refused(
    tmp_path: Path, folder: Path, position: int | None, value: bytes, reason: str
) -> None:
    data = bytearray((folder / "documents.idx").read_bytes())
    if position is None:
        del data[-9:]
    else:
        data[position : position + len(value) or None] = value
    (tmp_path / "corpus.idx").write_bytes(data)
    (tmp_path / "corpus.bin").write_bytes((folder / "documents.bin").read_bytes())
    with pytest.raises(ValueError, match=reason):
        Corpus(str(tmp_path / "corpus"))


def test_incompatible_options_and_inputs_are_refused(tmp_path: Path, folder: Path, tokenizer: Path) -> None:
    chats = write_prepared(tmp_path, 3, OPTIONS.horizons)
    blend = document_arguments(folder, train_data_path=["0.5", str(folder), "0.5", str(chats)])
    with pytest.raises(ValueError, match=f"{chats} holds conversations and other folders documents"):
        dataset_config(blend)
    with pytest.raises(ValueError, match="sfr_packing is for conversations"):
        dataset_config(document_arguments(folder, sfr_packing="first_fit_decreasing"))
    with pytest.raises(ValueError, match="is for documents; conversations have sfr_packing"):
        dataset_config(document_arguments(chats, dataloader_inter_document_masking=True))
    with pytest.raises(ValueError, match="nowhere does not exist; give a file, a folder"):
        prepare([tmp_path / "nowhere"], tmp_path / "p", tokenizer, OPTIONS, progress=False)
    other = DocumentOptions(eod_token="<eod>")
    with pytest.raises(ValueError, match="no '<eod>' to end documents on; name one of its tokens with --eod-token"):
        prepare([write_texts(tmp_path / "t")], tmp_path / "p", tokenizer, other, progress=False)


def test_inspect_shows_counts_and_futures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = PreparedDocuments.open(folder)
    position, segment, _ = prepared.anchors(1)
    assert main(["inspect", "--data", str(folder), "--sample", "1", "--anchors", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{len(TEXTS)}; 0 rejected" in out
    assert f"document 1: {len(position)} anchors" in out
    for row in segment[:2]:
        assert f"    {prepared.texts[row].strip()}" in out
    assert f"{len(position) - 2} more" in out
    assert main(["inspect", "--data", str(folder), "--html", "x.html"]) == 2
