"""With more data, known texts are not encoded again: their embeddings are copied from a store of the same encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions
from megatron_sfr.data.targets.store import COPIED
from megatron_sfr.data.targets.vectors import VECTORS
from megatron_sfr.storage.manifest import NAME
from tests.data.records import turns
from tests.data.stores import BLOCKS, RECORDS, damage_row, open_store, run, write_prepared

NEW = {"messages": turns("and the sky", "was it ever grey, and is the sea so blue as ever?")}


def texts_of(prepared: Path) -> list[str]:
    data = PreparedData.open(prepared)
    return [data.texts[row] for row in range(data.manifest.segments)]


def rows_by_text(store: Path, prepared: Path) -> dict[str, bytes]:
    vectors = open_store(store, prepared)[np.arange(len(texts_of(prepared)))]
    return {text: vector.tobytes() for text, vector in zip(texts_of(prepared), vectors, strict=True)}


@pytest.fixture
def old(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Prepared data with a store."""
    prepared = write_prepared(tmp_path / "old", tokenizer_folder)
    run(prepared)
    return prepared


def test_a_replaced_store_gives_its_embeddings_to_the_new_one(old, tokenizer_folder, encoded, capsys):
    before, had = rows_by_text(old / "targets", old), set(texts_of(old))
    write_prepared(old.parent, tokenizer_folder, [NEW, *RECORDS[1:]], force=True)
    wanted = set(texts_of(old))
    encoded.clear()

    run(old, progress=True)
    taken = wanted & had
    assert 0 < len(taken) < len(wanted)
    assert f"{len(taken)} of {len(wanted)} segments taken from {old / 'targets'}\n" in capsys.readouterr().out
    assert sorted(encoded) == sorted(wanted - had)
    after = rows_by_text(old / "targets", old)
    assert {text: after[text] for text in taken} == {text: before[text] for text in taken}
    copied = np.fromfile(old / "targets" / COPIED, np.uint8)
    assert [text in had for text in texts_of(old)] == copied.tolist()
    open_store(old / "targets", old).verify()


def test_other_stores_give_their_rows(old, tmp_path, tokenizer_folder, encoded, capsys):
    more = write_prepared(tmp_path / "more", tokenizer_folder, [NEW])
    run(more)
    both = write_prepared(tmp_path / "both", tokenizer_folder, [NEW, *RECORDS])
    encoded.clear()

    run(both, reuse=[str(old / "targets"), more / "targets"], progress=True)
    assert not encoded
    new = set(texts_of(more)) - set(texts_of(old))
    total = len(texts_of(both))
    out = capsys.readouterr().out
    assert f"{len(texts_of(old))} of {total} segments taken from {old / 'targets'}\n" in out
    assert f"{len(new)} of {total} segments taken from {more / 'targets'}\n" in out
    assert rows_by_text(both / "targets", both) == {
        **rows_by_text(more / "targets", more),
        **rows_by_text(old / "targets", old),
    }


def test_a_damaged_embedding_is_not_copied(old, tmp_path, tokenizer_folder, encoded):
    both = write_prepared(tmp_path / "both", tokenizer_folder, RECORDS)
    damage_row(old / "targets", 4)
    encoded.clear()

    run(both, reuse=[old / "targets"])
    assert encoded == [texts_of(old)[4]]


def test_rows_of_another_encoder_are_refused(old, tmp_path, tokenizer_folder):
    both = write_prepared(tmp_path / "both", tokenizer_folder)
    cls = EmbedOptions(pooling="cls", device="cpu")

    with pytest.raises(ValueError, match=r"other values of pooling; leave it out of --reuse"):
        run(both, options=cls, reuse=[old / "targets"])
    assert not (both / "targets").exists()
    with pytest.raises(ValueError, match=r"does not exist; leave it out of --reuse"):
        run(both, reuse=[tmp_path / "none"])


def test_an_unfinished_run_resumes_in_other_batches_with_force(old, encoded):
    store, texts = old / "targets", texts_of(old)
    manifest = store / NAME
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    damage_row(store, 0)
    other = replace(BLOCKS, batch_size=1)
    encoded.clear()

    with pytest.raises(ValueError, match=r"other values of batch_size; .*--force"):
        run(old, options=other)
    run(old, options=other, force=True)
    assert encoded == texts[:1]
    assert open_store(store, old).manifest.batch_size == 1


def test_an_unreadable_store_gives_nothing_and_is_reported(old, tokenizer_folder, encoded, capsys):
    write_prepared(old.parent, tokenizer_folder, [NEW, *RECORDS], force=True)
    vectors = old / "targets" / VECTORS
    vectors.write_bytes(vectors.read_bytes()[:-1])
    encoded.clear()

    run(old, progress=True)
    assert f"no segment taken from the store to be replaced: {vectors} has" in capsys.readouterr().out
    assert sorted(encoded) == sorted(texts_of(old))


def test_embeddings_beside_copied_ones_are_repaired_bit_for_bit(old, tokenizer_folder):
    store, options = old / "targets", replace(BLOCKS, batch_size=4, block_rows=16)
    write_prepared(old.parent, tokenizer_folder, [NEW, *RECORDS], force=True)
    run(old, options=options)
    expected = np.fromfile(store / VECTORS, np.uint16).reshape(-1, 384)
    copied = np.fromfile(store / COPIED, bool)
    assert copied[:16].any(), "records of both kinds in one block"
    new = np.flatnonzero(~copied[:16])
    assert len(new) > 4, "and more than a batch of new ones"
    damage_row(store, new[0])
    damage_row(store, new[-1])
    run(old, options=options, verify=True)
    assert (np.fromfile(store / VECTORS, np.uint16).reshape(-1, 384) == expected).all()

    first = np.flatnonzero(copied)[0]
    damage_row(store, first)
    run(old, options=options, verify=True)
    found = np.fromfile(store / VECTORS, np.uint16).reshape(-1, 384)
    assert (np.delete(found, first, 0) == np.delete(expected, first, 0)).all()
    np.testing.assert_allclose(found[first].view(np.float16), expected[first].view(np.float16), atol=5e-4)
