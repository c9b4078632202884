"""Targets that are encoded while the model trains: a process in the background fills stores ahead of the steps that
need them, in the blocks of fill.py, so that training on them equals training on stores that `embed` has filled.

A light thread walks the rows that the coming steps need and asks for their blocks, at most `lookahead` steps ahead of
the caller. `fetch` gives rows; what is not there yet it asks for before all else, waits for, and adds to `waited`.
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

Needs = Sequence[tuple[int, np.ndarray]]  # of one step: places of stores, and rows int64 [n] of each


class Prefetcher:
    """One for each process that trains; several may fill the same stores. Close it, or use it in a `with`.

    Its methods may be called from any thread of that process, not from the workers of a DataLoader.
    """

    def __init__(
        self,
        stores: Sequence[TargetStore],
        make_encoder: Callable[[], TextEncoder],
        *,
        lookahead: int,
        threads: int | None = 1,
    ) -> None:
        """stores: opened with `partial`, of this encoder. make_encoder: pickled, called once in the background process.

        lookahead: steps; 0 encodes only what is asked for. threads: of torch in that process, None as torch chooses.
        """
        if lookahead < 0:
            raise ValueError(f"lookahead is {lookahead}; give at least 0")
        self.waited = 0.0  # seconds that callers of `fetch` have waited, all together
        self._stores, self._lookahead = list(stores), lookahead
        self._position = 0  # the step, of those that are followed, at which the caller is
        self._changed = threading.Condition()  # of all that follows
        self._asked: set[Task] = set()  # and not yet done
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
        """The needs of the coming steps, in order; the first one's is the step at which the caller is. Once only.

        The iterable is walked in a thread of its own, no further than is asked for.
        """
        if self._lookahead:
            threading.Thread(target=self._ask_ahead, args=(steps,), name="targets: ahead", daemon=True).start()

    def advance(self) -> None:
        """The caller is at the next step."""
        with self._changed:
            self._position += 1
            self._changed.notify_all()

    def fetch(self, store: int, rows: np.ndarray) -> np.ndarray:
        """fp16 [n, D] of rows [n]: what is not there is encoded at once, foreseen or not.

        RuntimeError of one line where the background process has failed or ended; what it wrote is kept.
        """
        vectors, there = self._stores[store].rows.read(rows)
        if there.all() and self._failure is None:
            return vectors
        started = time.perf_counter()
        try:
            wanted = {Task(store, block, URGENT) for block in self._blocks(store, rows[~there])}
            with self._changed:
                if store in self._incomplete:
                    self._ask(wanted)
                self._changed.wait_for(lambda: self._is_answered(store, wanted))
                if self._closed or self._failure is not None:
                    reason = "the prefetcher is closed" if self._closed else self._failure
                    raise RuntimeError(f"{reason}; the targets encoded so far are kept in {self._stores[store].folder}")
        finally:
            self.waited += time.perf_counter() - started
        return self._stores[store][rows]

    def close(self) -> None:
        """Ends the process, in the middle of a block if need be: its rows are encoded by the next one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._process.kill()
        self._listener.join()
        self._process.close()

    def _blocks(self, store: int, rows: np.ndarray) -> list[int]:
        return np.unique(rows // self._stores[store].manifest.block_rows).tolist()

    def _ask(self, tasks: Iterable[Task]) -> None:
        """With the lock held."""
        for task in tasks:
            if task not in self._asked:
                self._asked.add(task)
                self._process.give(task)

    def _ask_ahead(self, steps: Iterable[Needs]) -> None:
        try:
            for needs in self._in_reach(steps):
                tasks = [
                    Task(store, block, AHEAD)
                    for store, rows in needs
                    for block in self._blocks(store, rows[~self._stores[store].rows.begun(rows)])
                ]
                with self._changed:
                    self._ask(tasks)
        except Exception as error:  # of the caller's iterable: fetch tells him
            self._fail(f"{type(error).__name__}: {error}")

    def _in_reach(self, steps: Iterable[Needs]) -> Iterator[Needs]:
        """Each step when the caller is `lookahead` steps before it; none any more when it is closed."""
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
        """Until all is there: then the process and its encoder are no longer needed."""
        try:
            while self._incomplete:
                message = self._process.receive()
                with self._changed:
                    self._hear(message)
                    self._changed.notify_all()
            self._process.kill()
        except (RuntimeError, ValueError) as error:
            self._fail(str(error))

    def _hear(self, message: EncoderIdentity | Task | Completed) -> None:
        if isinstance(message, Task):
            self._asked.discard(message)
        elif isinstance(message, Completed):
            self._incomplete.discard(message.store)
        else:
            for store in self._stores:
                if changed := differences(store.manifest, message):
                    raise ValueError(
                        f"{store.folder} was made with other values of {', '.join(changed)} than the encoder of "
                        "this run has; name another store, or embed it again with --force"
                    )

    def _is_answered(self, store: int, wanted: set[Task]) -> bool:
        """Whether there is nothing to wait for: all is there, or nothing comes any more."""
        done = store not in self._incomplete or not wanted & self._asked
        return done or self._closed or self._failure is not None

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()
