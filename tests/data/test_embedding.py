"""The target store: each distinct segment once, the same bytes after a kill, and no pair that does not fit."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.embedding import JOURNAL, EmbedOptions, embed
from megatron_sfr.data.encoder import Encoder, EncoderOptions
from megatron_sfr.data.manifest import NAME
from megatron_sfr.data.preparation import PrepareOptions, prepare
from megatron_sfr.data.prepared import PreparedData
from megatron_sfr.data.targets import STATISTICS, VECTORS, TargetStore
from tests.data.rows import turns, write_rows

CUT = PrepareOptions(seq_length=200, stride=4, horizons=((1, 12),), min_segment_length=4)
BLOCKS = EmbedOptions(batch_size=2, block_rows=3, device="cpu")
ROWS = [
    {"messages": turns("the sea", "is blue and the sky is grey and so on")},
    {"messages": turns("the sky", "is blue and the sky is grey and so on")},
    {"messages": turns("who", "the sky", "what", "is GREY and the sea is blue, as ever it was and will be!")},
]


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path) -> Path:
    prepare([write_rows(tmp_path / "rows.jsonl", ROWS)], tmp_path / "data", tokenizer_folder, CUT, progress=False)
    return tmp_path / "data"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every text that an encoder is given."""
    seen: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (seen.extend(texts), encode(self, texts))[1])
    return seen


def run(prepared: Path, **changes) -> Path:
    arguments = {"encoder": "minilm", "options": BLOCKS, "progress": False} | changes
    embed(prepared, **arguments)
    return prepared / "targets"


def test_each_distinct_segment_is_encoded_once_into_its_row(prepared: Path, encoded: list[str]):
    run(prepared)
    data = PreparedData.open(prepared)
    texts = [data.segment_text(row) for row in range(data.manifest.segments)]
    store = TargetStore.open(prepared / "targets", data)
    rows = np.concatenate([data[i].anchors.segment for i in range(len(data))])

    assert sorted(encoded) == sorted(texts)
    assert len(rows) > len(texts) > 2 * BLOCKS.block_rows, "segments repeat, and fill more than two blocks"
    vectors = store[rows]
    assert vectors.dtype == np.float16
    assert vectors.shape == (len(rows), store.dim) == (len(rows), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    expected = Encoder("minilm", EncoderOptions(device="cpu")).encode([texts[row] for row in rows])
    np.testing.assert_allclose(vectors, expected, atol=5e-4)  # half a unit in the last place of fp16 below 1
    assert len(store) == len(texts)
    every = store[np.arange(len(store))].astype(np.float64)
    assert (store.mean.dtype, store.std.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(store.mean, every.mean(axis=0), rtol=1e-7, atol=1e-12)  # half an fp32 unit
    np.testing.assert_allclose(store.std, every.std(axis=0), rtol=1e-7)
    assert not store.mean.flags.writeable
    assert not store.std.flags.writeable
    store.verify()


def test_a_finished_store_is_left_alone(prepared: Path, encoded: list[str]):
    before = (run(prepared) / VECTORS).stat().st_mtime_ns
    encoded.clear()
    run(prepared)

    assert not encoded
    assert (prepared / "targets" / VECTORS).stat().st_mtime_ns == before


CUTS = {  # how many blocks of the vectors and lines of the journal a kill, or a full disk, left
    "nothing": (0, -1),
    "half of the first block": (0.5, 0),
    "half a line": (2, 1.5),
    "vectors ahead of the journal": (3.5, 2),
    "journal ahead of the vectors": (1.5, 3),
    "all but the manifest": (4, 4),
}


@pytest.mark.parametrize(("blocks", "lines"), CUTS.values(), ids=CUTS)
def test_a_run_that_was_cut_goes_on_and_gives_the_same_bytes(prepared: Path, encoded, blocks, lines):
    store = run(prepared)
    total = len(encoded)
    assert total == 4 * BLOCKS.block_rows
    encoded.clear()
    expected = {path.name: path.read_bytes() for path in store.iterdir()}
    left = store.rename(prepared / ".targets.partial")
    (left / NAME).unlink()
    head = len(expected[JOURNAL].split(b"\n")[0]) + 1
    os.truncate(left / VECTORS, int(blocks * len(expected[VECTORS]) / 4))
    os.truncate(left / JOURNAL, max(0, head + int(lines * (len(expected[JOURNAL]) - head) / 4)))

    run(prepared)

    assert {path.name: path.read_bytes() for path in store.iterdir()} == expected
    assert len(encoded) == total - BLOCKS.block_rows * max(0, int(min(blocks, lines)))


def test_a_damaged_block_and_all_after_it_are_encoded_again(prepared: Path, encoded: list[str]):
    store = run(prepared)
    total = len(encoded)
    encoded.clear()
    expected = (store / VECTORS).read_bytes()
    left = store.rename(prepared / ".targets.partial")
    damaged = bytearray(expected)
    damaged[BLOCKS.block_rows * 384 * 2 + 5] ^= 1
    (left / VECTORS).write_bytes(damaged)

    run(prepared)

    assert (store / VECTORS).read_bytes() == expected
    assert len(encoded) == total - BLOCKS.block_rows


def test_what_another_encoder_left_is_not_taken_over(prepared: Path, encoded: list[str]):
    expected = run(prepared)
    total = len(encoded)
    content = (expected / VECTORS).read_bytes()
    left = expected.rename(prepared / ".targets.partial")
    (left / NAME).unlink()
    encoded.clear()

    options = EmbedOptions(batch_size=2, block_rows=3, device="cpu", pooling="cls")
    assert (run(prepared, options=options) / VECTORS).read_bytes() != content
    assert len(encoded) == total


def test_a_killed_process_leaves_no_store_and_is_taken_up_again(prepared: Path, encoded: list[str]):
    code = """
import os, signal, sys
from pathlib import Path
from megatron_sfr.data.embedding import Encoder, EmbedOptions, embed

encode, calls = Encoder.encode, []
def encode_four(self, texts):
    calls.append(texts)
    if len(calls) > 4:  # in the third block
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)

Encoder.encode = encode_four
embed(Path(sys.argv[1]), "minilm", EmbedOptions(batch_size=2, block_rows=3, device="cpu"), progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code, prepared], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr embed"):
        TargetStore.open(prepared / "targets", PreparedData.open(prepared))

    resumed = (run(prepared) / VECTORS).read_bytes()
    assert len(encoded) == PreparedData.open(prepared).manifest.segments - 2 * BLOCKS.block_rows
    run(prepared, output=prepared / "straight")
    assert (prepared / "straight" / VECTORS).read_bytes() == resumed


def test_targets_of_other_segments_are_refused_until_they_are_made_again(prepared: Path, tokenizer_folder: Path):
    run(prepared)
    rows = write_rows(prepared.parent / "rows.jsonl", ROWS[:1])
    prepare([rows], prepared, tokenizer_folder, CUT, force=True, progress=False)
    data = PreparedData.open(prepared)
    command = f"run: megatron-sfr embed --data {prepared} --encoder minilm --pooling mean --max-length 256"

    with pytest.raises(ValueError, match=f"targets is stale: .*{command} --dtype float32 --force"):
        TargetStore.open(prepared / "targets", data)
    with pytest.raises(ValueError, match="targets is stale"):
        run(prepared)
    run(prepared, force=True)
    assert len(TargetStore.open(prepared / "targets", data)) == data.manifest.segments


def test_another_pooling_needs_another_folder_or_force(prepared: Path):
    run(prepared)
    cls = EmbedOptions(pooling="cls", device="cpu")

    with pytest.raises(ValueError, match=r"made with other values of pooling; .*--force"):
        run(prepared, options=cls)
    run(prepared, options=cls, output=prepared / "cls")
    run(prepared, options=cls, force=True)
    data = PreparedData.open(prepared)
    stores = [TargetStore.open(prepared / name, data) for name in ("cls", "targets")]
    assert [store.manifest.pooling for store in stores] == ["cls", "cls"]


@pytest.mark.parametrize("name", [VECTORS, STATISTICS, NAME])
def test_a_store_that_is_cut_or_damaged_is_refused(prepared: Path, name: str):
    path = run(prepared) / name
    data = PreparedData.open(prepared)
    content = path.read_bytes()

    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"{name} .*; run: megatron-sfr embed --data {prepared} .*--force"):
        TargetStore.open(prepared / "targets", data)
    if name != NAME:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        store = TargetStore.open(prepared / "targets", data)
        with pytest.raises(ValueError, match="is not what was written"):
            store.verify()
    run(prepared, force=True)
    TargetStore.open(prepared / "targets", data).verify()


def test_a_store_of_an_older_version_is_refused(prepared: Path):
    path = run(prepared) / NAME
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))

    with pytest.raises(ValueError, match=f"is of version 1, .*; run: megatron-sfr embed --data {prepared} .*--force"):
        TargetStore.open(prepared / "targets", PreparedData.open(prepared))


def test_opens_again_in_another_process(prepared: Path):
    store = TargetStore.open(run(prepared), PreparedData.open(prepared))
    dumped = pickle.dumps(store)

    assert len(dumped) < 1000, "the folders' names, not their content"
    assert (pickle.loads(dumped)[np.array([1, 0])] == store[np.array([1, 0])]).all()


def test_nothing_to_embed_and_a_folder_of_someone_else_are_refused(tmp_path: Path, tokenizer_folder: Path, prepared):
    rows = write_rows(tmp_path / "short.jsonl", [{"messages": turns("the sea", "no")}])
    prepare([rows], tmp_path / "short", tokenizer_folder, CUT, progress=False)

    with pytest.raises(ValueError, match=r"has no segments to embed; .*--min-segment-length"):
        run(tmp_path / "short")
    with pytest.raises(ValueError, match="is no target store"):
        run(prepared, output=tmp_path, force=True)
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr prepare"):
        run(tmp_path / "none")


@pytest.mark.parametrize("name", ["batch_size", "block_rows"])
def test_impossible_options_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        EmbedOptions(**{name: 0})
