"""The target store: each distinct segment is encoded once; a store of other data or another encoder is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr import cli
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions
from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.data.targets.store import COPIED, DIGESTS, STATISTICS, TargetStore
from megatron_sfr.data.targets.vectors import CHECKSUMS, VECTORS
from megatron_sfr.storage.manifest import NAME
from tests.data.records import files_of, turns
from tests.data.stores import BLOCKS, RECORDS, flip, manifest_of, open_store, run, write_prepared


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return write_prepared(tmp_path, tokenizer_folder)


def test_each_distinct_segment_is_encoded_once_into_its_row(prepared: Path, encoded: list[str]):
    store = open_store(run(prepared), prepared)
    data = store.prepared
    texts = [data.texts[row] for row in range(data.manifest.segments)]
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
    store.verify()


def test_statistics_are_of_all_rows_and_come_with_the_last(prepared: Path):
    store = open_store(run(prepared), prepared)
    every = store[np.arange(len(store))].astype(np.float64)

    assert (store.mean.dtype, store.std.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(store.mean, every.mean(axis=0), rtol=1e-7, atol=1e-12)  # half an fp32 unit
    np.testing.assert_allclose(store.std, every.std(axis=0), rtol=1e-7)
    assert not store.mean.flags.writeable
    assert not store.std.flags.writeable


def test_a_finished_store_is_not_changed(prepared: Path, encoded: list[str], capsys):
    store = run(prepared)
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    encoded.clear()

    run(prepared, progress=True)
    assert capsys.readouterr().out == f"{store} is up to date\n"
    run(prepared, force=True)
    run(prepared, options=EmbedOptions(device="cpu"))  # other batches: equal up to rounding
    assert not encoded
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_targets_of_other_segments_are_refused_and_brought_up_to_date(prepared: Path, tokenizer_folder: Path):
    run(prepared)
    write_prepared(prepared.parent, tokenizer_folder, RECORDS[:1], force=True)
    command = f"run: megatron-sfr embed --data {prepared} --encoder minilm --pooling mean --max-length 256"
    command += " --dtype float32 --batch-size 2 --block-rows 3"

    with pytest.raises(ValueError, match=f"targets is stale: .*{command}$"):
        open_store(prepared / "targets", prepared)
    store = open_store(run(prepared), prepared)
    assert len(store) == store.prepared.manifest.segments < 12
    store.verify()


def test_another_encoder_needs_another_folder_or_force(prepared: Path):
    run(prepared)
    cls = EmbedOptions(pooling="cls", prompt="passage: ", device="cpu")

    with pytest.raises(ValueError, match=r"made with other values of pooling, prompt; .*--force"):
        run(prepared, options=cls)
    run(prepared, options=cls, output=prepared / "cls")
    run(prepared, options=cls, force=True)
    stores = [open_store(prepared / name, prepared) for name in ("cls", "targets")]
    assert [store.manifest.pooling for store in stores] == ["cls", "cls"]
    assert (stores[0][np.arange(12)] == stores[1][np.arange(12)]).all()


def test_a_truncated_store_is_refused_and_repaired(prepared: Path):
    store = run(prepared)
    expected = files_of(store)
    for name in (VECTORS, CHECKSUMS, STATISTICS, DIGESTS, COPIED, NAME):
        (store / name).write_bytes(expected[name][:-3])
        flag = "--force" if name == NAME else "--verify"

        with pytest.raises(ValueError, match=f"{name} .*; run: megatron-sfr embed --data {prepared} .*{flag}"):
            open_store(store, prepared)
        with pytest.raises(ValueError, match=flag):
            run(prepared)
        run(prepared, **{flag.strip("-"): True})
        assert files_of(store) == expected


def test_one_flipped_bit_is_found_and_repaired(prepared: Path, capsys: pytest.CaptureFixture):
    """By a read of all bytes, by `inspect --verify`, and by `embed --verify`."""
    store = run(prepared)
    expected = files_of(store)
    assert cli.main(["inspect", "--data", str(prepared), "--verify"]) == 0
    assert "targets: every target is as it was written" in capsys.readouterr().out
    for name in (VECTORS, CHECKSUMS, STATISTICS, DIGESTS, COPIED):
        flip(store / name, 1)

        damage = r"(embedding 0 is missing or damaged|is not what was written) .*; run: megatron-sfr embed .*--verify"
        with pytest.raises(ValueError, match=damage):
            open_store(store, prepared).verify()
        assert cli.main(["inspect", "--data", str(prepared), "--verify"]) == 2
        assert str(store) in capsys.readouterr().err
        run(prepared, verify=True)
        assert files_of(store) == expected


def test_a_store_of_an_older_version_is_refused(prepared: Path):
    path = run(prepared) / NAME
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))

    with pytest.raises(ValueError, match=f"is of version 2, .*; run: megatron-sfr embed --data {prepared} .*--force"):
        open_store(prepared / "targets", prepared)


def test_opens_again_in_another_process(prepared: Path):
    store = open_store(run(prepared), prepared)
    dumped = pickle.dumps(store)

    assert len(dumped) < 1000, "the folders' names, not their content"
    assert (pickle.loads(dumped)[np.array([1, 0])] == store[np.array([1, 0])]).all()


def test_nothing_to_embed_and_a_foreign_folder_are_refused(tmp_path: Path, tokenizer_folder: Path, prepared):
    short = write_prepared(tmp_path / "short", tokenizer_folder, [{"messages": turns("the sea", "no")}])

    with pytest.raises(ValueError, match=r"has no segments to embed; .*--min-segment-length"):
        run(short)
    with pytest.raises(ValueError, match="is not a target store"):
        run(prepared, output=tmp_path, force=True)
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr prepare"):
        run(tmp_path / "none")
    with pytest.raises(ValueError, match="does not exist; run: megatron-sfr embed"):
        TargetStore.open(prepared / "targets", PreparedData.open(prepared))


def test_the_identity_records_how_an_embedding_was_made(prepared: Path):
    options = EmbedOptions(
        normalize="none", prompt="query: ", max_length=64, dtype="bfloat16", batch_size=5, block_rows=7, device="cpu"
    )
    found = manifest_of(run(prepared, options=options), prepared)

    assert (found.encoder, found.revision, found.pooling, found.normalize) == ("minilm", None, "mean", "none")
    assert (found.prompt, found.max_length, found.dtype, found.dim) == ("query: ", 64, "bfloat16", 384)
    assert (found.batch_size, found.block_rows, found.complete) == (5, 7, True)


@pytest.mark.parametrize("name", ["batch_size", "block_rows", "workers"])
def test_impossible_options_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        EmbedOptions(**{name: 0})
    with pytest.raises(ValueError, match="one device or several"):
        EmbedOptions(device="cpu", devices=("cpu", "cpu"))
