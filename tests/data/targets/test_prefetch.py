"""Targets encoded in the background: equal to `embed` bit for bit, never too far ahead, every failure reported.

With real processes. What this does not exercise: a GPU, several machines.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.create import create_store
from megatron_sfr.data.targets.encoder_process import EncodingProcess
from megatron_sfr.data.targets.prefetch import Needs, Prefetcher
from megatron_sfr.data.targets.store import EncoderIdentity, StoreIdentity, TargetStore
from tests.data.records import files_of
from tests.data.stores import BLOCKS, damage_row, open_store, run, write_prepared
from tests.data.targets.encoders import Failing, Logged, encoded_in

ROWS, BLOCK = 12, BLOCKS.block_rows
BLOCK_BY_BLOCK = [[(0, np.arange(first, first + BLOCK))] for first in range(0, ROWS, BLOCK)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prefetch"), tokenizer_folder)


@pytest.fixture(scope="module")
def whole(prepared: Path) -> Path:
    """A store that `embed` has filled."""
    return run(prepared, output=prepared.parent / "whole")


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> EncoderIdentity:
    with closing(EncodingProcess(partial(Logged, tmp_path_factory.mktemp("log") / "log"))) as process:
        return process.receive()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def store(prepared: Path, identity: EncoderIdentity, tmp_path: Path, forked: None) -> TargetStore:
    """A store that is begun and has no row yet."""
    both = StoreIdentity(**vars(identity), batch_size=BLOCKS.batch_size, block_rows=BLOCKS.block_rows)
    create_store(tmp_path / "store", PreparedData.open(prepared), both)
    return open_store(tmp_path / "store", prepared, partial=True)


def until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    """Waits for what other processes are about to do."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def is_complete(store: TargetStore) -> bool:
    return open_store(store.folder, store.prepared.folder, partial=True).manifest.complete


@pytest.mark.parametrize("lookahead", [0, 2])
def test_training_reads_what_embed_would_have_written(store, whole, log, prepared, lookahead: int):
    rng = np.random.default_rng(5)
    steps = [[(0, rng.permutation(ROWS)[:4])] for _ in range(6)]
    offline = open_store(whole, prepared)
    with Prefetcher([store], partial(Logged, log), lookahead=lookahead) as prefetcher:
        prefetcher.follow(steps)
        for [(_, rows)] in steps:
            assert (prefetcher.fetch(0, rows) == offline[rows]).all()
            prefetcher.advance()
        assert prefetcher.waited > 0, "for the first step at least"
        prefetcher.fetch(0, np.arange(ROWS))
        assert until(lambda: is_complete(store)), "the process with the last row completes the store"
        assert until(lambda: not is_running(prefetcher._process.pid)), "an encoder that is not needed any more ends"
        assert (prefetcher.fetch(0, np.arange(ROWS)) == offline[np.arange(ROWS)]).all()
    assert files_of(store.folder) == files_of(whole)
    assert encoded_in(log) == ROWS


def test_never_further_ahead_than_allowed_and_no_waiting_for_predicted_blocks(store, log):
    walked: list[int] = []

    def steps() -> Iterator[Needs]:
        for number, needs in enumerate(BLOCK_BY_BLOCK):
            walked.append(number)
            yield needs

    with Prefetcher([store], partial(Logged, log), lookahead=1) as prefetcher:
        prefetcher.follow(steps())
        for at in range(len(BLOCK_BY_BLOCK)):
            reach = min((at + 2) * BLOCK, ROWS)
            assert until(lambda reach=reach: len(store.embeddings.missing()) == ROWS - reach)
            time.sleep(0.3)  # long enough for another block
            assert len(walked) == reach / BLOCK
            assert encoded_in(log) == reach
            prefetcher.fetch(0, BLOCK_BY_BLOCK[at][0][1])
            prefetcher.advance()
        assert prefetcher.waited == 0


def test_rows_that_nobody_foresaw_come_before_those_that_somebody_did(store, log):
    with Prefetcher([store], partial(Logged, log, 0.4), lookahead=9) as prefetcher:
        prefetcher.follow(BLOCK_BY_BLOCK[:3])
        assert until(lambda: encoded_in(log) > 0)
        started = time.perf_counter()
        prefetcher.fetch(0, np.array([ROWS - 1]))
        took = time.perf_counter() - started
        assert len(store.embeddings.missing()) >= BLOCK, "others are still to come"
        assert 0.4 < prefetcher.waited <= took


def test_a_row_torn_by_an_earlier_run_is_encoded_again(store, whole, log, prepared):
    with Prefetcher([store], partial(Logged, log), lookahead=0) as prefetcher:
        prefetcher.fetch(0, np.arange(BLOCK))
        damage_row(store.folder, 1)
        assert (prefetcher.fetch(0, np.arange(BLOCK)) == open_store(whole, prepared)[np.arange(BLOCK)]).all()


def test_a_killed_encoder_is_an_error_at_once_and_the_next_one_resumes(store, whole, log):
    with Prefetcher([store], partial(Logged, log), lookahead=0) as prefetcher:
        prefetcher.fetch(0, np.arange(2 * BLOCK))
        os.kill(prefetcher._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=rf"ended with exit code -9; .* are kept in {store.folder}$") as caught:
            prefetcher.fetch(0, np.arange(ROWS))
        assert "\n" not in str(caught.value)
        with pytest.raises(RuntimeError, match="exit code -9"):
            prefetcher.fetch(0, np.arange(BLOCK))

    with Prefetcher([store], partial(Logged, log, 60), lookahead=0) as prefetcher:
        assert len(prefetcher.fetch(0, np.arange(2 * BLOCK))) == 2 * BLOCK
        assert prefetcher.waited == 0
        before = encoded_in(log)
        killer = threading.Thread(
            target=lambda: until(lambda: encoded_in(log) > before) and os.kill(prefetcher._process.pid, signal.SIGKILL)
        )
        killer.start()
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="exit code -9"):
            prefetcher.fetch(0, np.arange(ROWS))
        assert time.monotonic() - started < 50, "it did not wait for the encoder that sleeps"
        killer.join()

    with Prefetcher([store], partial(Logged, log), lookahead=0) as prefetcher:
        prefetcher.fetch(0, np.arange(ROWS))
        assert until(lambda: is_complete(store))
    assert files_of(store.folder) == files_of(whole)


def test_an_encoder_that_fails_is_one_line_that_names_the_store(store, log):
    with Prefetcher([store], partial(Failing, log), lookahead=1) as prefetcher:
        expected = f"{store.folder}, block 1: RuntimeError: out of memory: tried to allocate 2 GiB; "
        with pytest.raises(RuntimeError, match=expected) as caught:
            prefetcher.fetch(0, np.array([BLOCK]))
        assert "\n" not in str(caught.value)


def test_another_encoder_and_unknown_needs_are_errors(store, log):
    options = replace(BLOCKS, pooling="cls")
    with (
        Prefetcher([store], partial(Logged, log, 0.0, options), lookahead=0) as prefetcher,
        pytest.raises(RuntimeError, match=r"was made with other values of pooling than the encoder of this run"),
    ):
        prefetcher.fetch(0, np.array([0]))

    def steps() -> Iterator[Needs]:
        yield from BLOCK_BY_BLOCK[:1]
        raise IndexError("sample 7 of 5")

    with Prefetcher([store], partial(Logged, log), lookahead=4) as prefetcher:
        prefetcher.follow(steps())
        with pytest.raises(RuntimeError, match="IndexError: sample 7 of 5"):
            prefetcher.fetch(0, np.arange(ROWS))
    with pytest.raises(ValueError, match="lookahead is -1"):
        Prefetcher([store], partial(Logged, log), lookahead=-1)


def test_two_that_fill_one_store_share_the_work(store, whole, log, prepared):
    prefetchers = [Prefetcher([store], partial(Logged, log, 0.05), lookahead=1) for _ in range(2)]

    def train(prefetcher: Prefetcher) -> None:
        prefetcher.follow(BLOCK_BY_BLOCK)
        for [(_, rows)] in BLOCK_BY_BLOCK:
            assert (prefetcher.fetch(0, rows) == open_store(whole, prepared, partial=True)[rows]).all()
            prefetcher.advance()

    threads = [threading.Thread(target=train, args=(prefetcher,)) for prefetcher in prefetchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert until(lambda: is_complete(store))
    assert [prefetcher._failure for prefetcher in prefetchers] == [None, None]
    for prefetcher in prefetchers:
        prefetcher.close()
    assert encoded_in(log) == ROWS, "no block twice"
    assert files_of(store.folder) == files_of(whole)


TRAINER = """
import os, signal, sys
from functools import partial
from pathlib import Path
import numpy as np
from megatron_sfr.data.targets.prefetch import Prefetcher
from tests.data.targets.encoders import Logged
from tests.data.stores import open_store

if __name__ == "__main__":
    folder, prepared, log, end = sys.argv[1:]
    store = open_store(Path(folder), Path(prepared), partial=True)
    prefetcher = Prefetcher([store], partial(Logged, Path(log)), lookahead=0)
    prefetcher.fetch(0, np.array([0]))
    print(prefetcher._process.pid, flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raised":
        raise SystemExit(3)
"""


@pytest.mark.recovery
@pytest.mark.parametrize(("end", "code"), [("killed", -signal.SIGKILL), ("raised", 3), ("over", 0)])
def test_the_encoder_ends_with_the_trainer(store, log, tmp_path: Path, end: str, code: int):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, script, store.folder, store.prepared.folder, log, end]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)

    assert (done.returncode, done.stderr) == (code, "")
    assert until(lambda: not is_running(int(done.stdout)), 10)
    assert len(store.embeddings.missing()) == ROWS - BLOCK


def is_running(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
