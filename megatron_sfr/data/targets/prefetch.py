"""Encodes targets while the model trains: a background process fills the stores ahead of the steps that need them.

It fills the blocks of fill.py, so training equals training on stores that `embed` has filled. A thread walks the rows
that the coming steps need and requests their blocks, at most `lookahead` steps ahead of the caller. `fetch` returns
rows; it requests missing ones first of all, waits for them, and adds the time to `waited`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from megatron_sfr.data.targets.encoder_process import AHEAD, URGENT, Completed, EncodingProcess, Open, Task
from megatron_sfr.data.targets.fill import TextEncoder
from megatron_sfr.data.targets.store import EncoderIdentity, TargetStore, differences

Needs = Sequence[tuple[int, np.ndarray]]  # of one step: indices of stores, and rows int64 [n] of each


class Prefetcher:
    """The targets of one training process; several may fill the same stores. Close it, or use it in a `with`.

    Its methods may be called from any thread of that process, but not from the workers of a DataLoader.
    """

    def __init__(
        self,
        stores: Sequence[TargetStore],
        make_encoder: Callable[[], TextEncoder],
        *,
        lookahead: int,
        threads: int | None = 1,
    ) -> None:
        """Starts the background process.

        Args:
            stores: stores of this encoder, opened with `partial`.
            make_encoder: loads the encoder; pickled, called once in the background process.
            lookahead: steps to encode ahead; 0 encodes only what `fetch` requests.
            threads: torch's threads in that process; None leaves the choice to torch.
        """
        if lookahead < 0:
            raise ValueError(f"lookahead is {lookahead}; give at least 0")
        self.waited = 0.0  # seconds that callers of `fetch` have waited in total
        self._stores, self._lookahead = list(stores), lookahead
        self._position = 0  # the caller's step, among those that are followed
        self._changed = threading.Condition()  # guards what follows
        self._requested: set[Task] = set()  # requested, and not yet done
        self._incomplete = {i for i, store in enumerate(self._stores) if not store.manifest.complete}
        self._failure: str | None = None
        self._closed = False
        self._process = EncodingProcess(make_encoder, threads=threads)
        for number in self._incomplete:
            store = self._stores[number]
            self._process.give(Open(number, store.folder, store.prepared.folder, completes=True))
        self._listener = threading.Thread(target=self._listen, name="targets: done", daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def follow(self, steps: Iterable[Needs]) -> None:
        """Takes the needs of the coming steps, in order; the first step is the caller's. Call it once.

        The iterable is walked in a separate thread, no further than `lookahead` steps ahead.
        """
        if self._lookahead:
            threading.Thread(target=self._request_ahead, args=(steps,), name="targets: ahead", daemon=True).start()

    def advance(self) -> None:
        """Moves the caller to its next step."""
        with self._changed:
            self._position += 1
            self._changed.notify_all()

    def fetch(self, store: int, rows: np.ndarray) -> np.ndarray:
        """The embeddings of rows [n], fp16 [n, D]. Missing ones are encoded first of all.

        Raises:
            RuntimeError: in one line, if the background process has failed or ended. What it wrote is kept.
        """
        vectors, there = self._stores[store].embeddings.read(rows)
        if there.all() and self._failure is None:
            return vectors
        started = time.perf_counter()
        try:
            wanted = {Task(store, block, URGENT) for block in self._blocks(store, rows[~there])}
            with self._changed:
                if store in self._incomplete:
                    self._request(wanted)
                self._changed.wait_for(lambda: self._is_done(store, wanted))
                if self._closed or self._failure is not None:
                    reason = "the prefetcher is closed" if self._closed else self._failure
                    raise RuntimeError(f"{reason}; the targets encoded so far are kept in {self._stores[store].folder}")
        finally:
            self.waited += time.perf_counter() - started
        return self._stores[store][rows]

    def close(self) -> None:
        """Ends the process, also in the middle of a block, which the next process encodes again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._process.kill()
        self._listener.join()
        self._process.close()

    def _blocks(self, store: int, rows: np.ndarray) -> list[int]:
        return np.unique(rows // self._stores[store].manifest.block_rows).tolist()

    def _request(self, tasks: Iterable[Task]) -> None:
        """Requests tasks that are not requested yet. The caller holds the lock."""
        for task in tasks:
            if task not in self._requested:
                self._requested.add(task)
                self._process.give(task)

    def _request_ahead(self, steps: Iterable[Needs]) -> None:
        try:
            for needs in self._in_reach(steps):
                tasks = [
                    Task(store, block, AHEAD)
                    for store, rows in needs
                    for block in self._blocks(store, rows[~self._stores[store].embeddings.begun(rows)])
                ]
                with self._changed:
                    self._request(tasks)
        except Exception as error:  # in the caller's iterable: `fetch` raises it
            self._fail(f"{type(error).__name__}: {error}")

    def _in_reach(self, steps: Iterable[Needs]) -> Iterator[Needs]:
        """Yields each step once the caller is `lookahead` steps before it, until the prefetcher is closed."""
        walk = iter(steps)
        for number in itertools.count():
            with self._changed:
                while not self._closed and number > self._position + self._lookahead:
                    self._changed.wait()
                if self._closed:
                    return
            if (needs := next(walk, None)) is None:
                return
            yield needs

    def _listen(self) -> None:
        """Receives messages until all stores are complete, then ends the process."""
        try:
            while self._incomplete:
                message = self._process.receive()
                with self._changed:
                    self._handle(message)
                    self._changed.notify_all()
            self._process.kill()
        except (RuntimeError, ValueError) as error:
            self._fail(str(error))

    def _handle(self, message: EncoderIdentity | Task | Completed) -> None:
        if isinstance(message, Task):
            self._requested.discard(message)
        elif isinstance(message, Completed):
            self._incomplete.discard(message.store)
        else:
            for store in self._stores:
                if changed := differences(store.manifest, message):
                    raise ValueError(
                        f"{store.folder} was made with other values of {', '.join(changed)} than the encoder of "
                        "this run has; name another store, or embed it again with --force"
                    )

    def _is_done(self, store: int, wanted: set[Task]) -> bool:
        """Whether there is nothing to wait for: everything is encoded, or nothing more will be."""
        done = store not in self._incomplete or not wanted & self._requested
        return done or self._closed or self._failure is not None

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()
