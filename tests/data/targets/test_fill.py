"""An embedding's bits depend on the store's identity only, not on the process, the order, or a kill and resume.

Every comparison is of whole files, bit for bit, and a control shows that other batches do give other bits.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.create import create_store
from megatron_sfr.data.targets.embed import EmbedOptions
from megatron_sfr.data.targets.encoder import Encoder
from megatron_sfr.data.targets.encoder_pool import open_pool
from megatron_sfr.data.targets.fill import CLAIMS, StoreWriter
from megatron_sfr.data.targets.store import StoreIdentity
from megatron_sfr.data.targets.vectors import CHECKSUMS, VECTORS
from tests.data.records import files_of
from tests.data.stores import BLOCKS, damage_row, flip, open_store, run, write_prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_prepared(tmp_path_factory.mktemp("writer"), tokenizer_folder)


@pytest.fixture(scope="module")
def whole(prepared: Path) -> Path:
    """A store that was filled at once by one process."""
    return run(prepared, output=prepared.parent / "whole")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("minilm", BLOCKS)


def begin(folder: Path, prepared: Path, encoder: Encoder, options: EmbedOptions = BLOCKS) -> StoreWriter:
    """A store that is begun and has no row yet."""
    identity = StoreIdentity(**vars(encoder.identity), batch_size=options.batch_size, block_rows=options.block_rows)
    create_store(folder, PreparedData.open(prepared), identity)
    return StoreWriter(folder, PreparedData.open(prepared))


def test_other_batches_give_other_bits(prepared: Path, whole: Path, tmp_path: Path):
    for options in (replace(BLOCKS, batch_size=3), replace(BLOCKS, block_rows=4)):
        store = run(prepared, output=tmp_path / str(options.block_rows), options=options)
        assert files_of(store)[VECTORS] != files_of(whole)[VECTORS]
        rows = np.arange(12)
        same = open_store(whole, prepared)[rows], open_store(store, prepared)[rows]
        np.testing.assert_allclose(*same, atol=5e-4)


def test_blocks_in_any_order(prepared: Path, whole: Path, encoder: Encoder, tmp_path: Path):
    with begin(tmp_path / "store", prepared, encoder) as writer:
        assert writer.blocks == 4
        for block in (2, 0, 3):
            assert writer.fill(block, encoder)
        assert not writer.all_begun()
        assert writer.complete().tolist() == [3, 4, 5]
        assert writer.fill(1, encoder)
        assert writer.all_begun()
        assert len(writer.complete()) == 0
    assert files_of(tmp_path / "store") == files_of(whole)


@pytest.mark.usefixtures("forked")
def test_three_processes(prepared: Path, whole: Path, tmp_path: Path, encoded: list[str]):
    store = run(prepared, output=tmp_path / "store", options=replace(BLOCKS, workers=3))

    assert not encoded, "all of it elsewhere"
    assert files_of(store) == files_of(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_sfr.data.targets.encoder import Encoder
from tests.data.stores import run

encode, calls = Encoder.encode, []
def encode_four(self, texts):
    calls.append(texts)
    if len(calls) > 4:  # in the third block
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)

Encoder.encode = encode_four
run(Path(sys.argv[1]), output=Path(sys.argv[2]))
"""


@pytest.mark.recovery
def test_a_killed_run_leaves_an_incomplete_store_and_resumes(
    prepared: Path, whole: Path, tmp_path: Path, encoded: list[str]
):
    store = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", KILLED, prepared, store], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    with pytest.raises(ValueError, match=r"is not complete: it has 6 of 12 targets; run: megatron-sfr embed .*minilm"):
        open_store(store, prepared)
    partial = open_store(store, prepared, partial=True)
    assert (partial[np.arange(6)] == open_store(whole, prepared)[np.arange(6)]).all()
    with pytest.raises(ValueError, match="embedding 6 and 1 more are missing or damaged"):
        partial[np.array([5, 6, 7])]
    with pytest.raises(ValueError, match="no statistics before it is complete"):
        _ = partial.mean

    run(prepared, output=store)
    assert len(encoded) == 6
    assert files_of(store) == files_of(whole)


TORN = {  # what a power failure may leave of two files whose pages reach the disk in any order
    "a row without its checksum": lambda store: wipe(store / CHECKSUMS, 4 * 4, 4),
    "a checksum without its row": lambda store: wipe(store / VECTORS, 4 * 768, 768),
    "half a row": lambda store: wipe(store / VECTORS, 4 * 768 + 400, 368),
    "half a checksum": lambda store: wipe(store / CHECKSUMS, 4 * 4, 2),
}


def wipe(path: Path, start: int, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(count))


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_write_costs_its_block(prepared: Path, whole: Path, encoder, encoded, tmp_path: Path, tear):
    store = tmp_path / "store"
    with begin(store, prepared, encoder) as writer:
        for block in (1, 2):
            writer.fill(block, encoder)
    tear(store)
    encoded.clear()

    run(prepared, output=store)
    assert len(encoded) == 3 * BLOCKS.block_rows, "two blocks that had not begun, and the torn one"
    assert files_of(store) == files_of(whole)


def test_damage_is_found_where_it_is_read_and_only_its_block_is_encoded_again(
    prepared: Path, whole: Path, tmp_path: Path, encoded: list[str], capsys
):
    store = run(prepared, output=tmp_path / "store")
    damage_row(store, 4)
    flip(store / CHECKSUMS, 4 * 7)
    encoded.clear()
    opened = open_store(store, prepared)

    assert (opened[np.array([3, 5, 11])] == open_store(whole, prepared)[np.array([3, 5, 11])]).all()
    with pytest.raises(ValueError, match=rf"^{store}: embedding 4 is missing .*; run: megatron-sfr .*--verify$"):
        opened[np.array([3, 4])]
    run(prepared, output=store)
    assert not encoded, "nobody asked for every row to be read"
    run(prepared, output=store, verify=True, progress=True)
    assert f"{store}: 2 of 12 embeddings are missing or damaged" in capsys.readouterr().out
    assert len(encoded) == 2 * BLOCKS.block_rows
    assert files_of(store) == files_of(whole)


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_block_that_another_process_encodes_is_skipped(prepared: Path, encoder: Encoder, tmp_path: Path):
    with begin(tmp_path / "store", prepared, encoder) as writer:
        command = [sys.executable, "-c", HOLDER, tmp_path / "store" / CLAIMS]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        assert not writer.fill(1, encoder)
        assert writer.fill(2, encoder)
        holder.kill()
        holder.communicate()
        assert writer.fill(1, encoder)


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_is_an_error_at_once_and_loses_nothing(
    prepared: Path, encoder: Encoder, tmp_path: Path, encoded: list[str]
):
    options = replace(BLOCKS, batch_size=1, block_rows=1)
    pool = open_pool("minilm", options, ("cpu", "cpu"))
    with begin(tmp_path / "store", prepared, encoder, options) as writer:
        work = pool.fill(writer, range(writer.blocks))
        done = [next(work)]
        os.kill(next(iter(pool._processes.values())).pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="ended with exit code -9; what is encoded is kept: run the same command"):
            done.extend(work)
        pool.close()
        left = writer.store.embeddings.missing()
        assert not set(done) & set(left.tolist())
    run(prepared, output=tmp_path / "store", options=options)
    assert len(encoded) == len(left) > 0


@pytest.mark.usefixtures("forked")
def test_an_encoder_that_fails_in_a_process_is_one_line(prepared: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot load the encoder .*none") as caught:
        run(prepared, encoder=str(tmp_path / "none"), options=replace(BLOCKS, workers=2))
    assert "\n" not in str(caught.value)
