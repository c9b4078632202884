"""Encoder pools for `embed`: in this process, or in several processes that share the store's blocks."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Protocol, cast

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions, load_quietly
from megatron_sfr.data.targets.encoder_process import CLAIMED_WAIT, EncodingProcess, Open, Task
from megatron_sfr.data.targets.fill import StoreWriter
from megatron_sfr.data.targets.store import EncoderIdentity

QUEUED_BLOCKS = 2
"""Blocks that a process holds: the one that it encodes, and the next."""


class EncoderPool(Protocol):
    """Loaded encoders."""

    identity: EncoderIdentity

    def fill(self, writer: StoreWriter, blocks: Sequence[int]) -> Iterator[int]:
        """Encodes what is missing of these blocks. Yields the number of each when it is done."""
        ...

    def close(self) -> None: ...


def open_pool(encoder: str, options: EncoderOptions, devices: Sequence[str | None]) -> EncoderPool:
    """A pool with a process for each device, which may be named several times; for one device, in this process."""
    each = [replace(options, device=device) for device in devices]
    return InProcessPool(Encoder(encoder, each[0])) if len(each) == 1 else MultiProcessPool(encoder, each)


class InProcessPool:
    """An encoder in this process."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.identity = encoder.identity

    def fill(self, writer: StoreWriter, blocks: Sequence[int]) -> Iterator[int]:
        todo = deque(blocks)
        while todo:
            block = todo.popleft()
            if writer.fill(block, self._encoder):
                yield block
            else:
                todo.append(block)
                time.sleep(CLAIMED_WAIT)

    def close(self) -> None:
        pass


class MultiProcessPool:
    """Processes with an encoder each. Raises ValueError as soon as one fails or dies."""

    def __init__(self, encoder: str, options: Sequence[EncoderOptions]) -> None:
        cores = len(os.sched_getaffinity(0))
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cores // len(options))
        started = [EncodingProcess(partial(load_quietly, encoder, each), threads=threads) for each in options]
        self._opened = 0  # stores
        self._processes = {process.connection: process for process in started}
        try:
            identities = {process.receive() for process in started}
        except RuntimeError as error:
            self.close()
            raise ValueError(str(error)) from error
        assert len(identities) == 1, "one name and one set of options"
        self.identity = cast(EncoderIdentity, identities.pop())

    def fill(self, writer: StoreWriter, blocks: Sequence[int]) -> Iterator[int]:
        store, todo = writer.store, deque(blocks)
        self._opened += 1

        def give_next(process: EncodingProcess) -> None:
            if todo:
                process.give(Task(self._opened - 1, todo.popleft()))

        for process in self._processes.values():
            process.give(Open(self._opened - 1, store.folder, store.prepared.folder, completes=False))
        for process in [*self._processes.values()] * QUEUED_BLOCKS:
            give_next(process)
        done = 0
        while done < len(blocks):
            for connection in wait(self._processes):
                process = self._processes[cast(Connection, connection)]
                task = _next_done(process)
                give_next(process)
                done += 1
                yield task.block

    def close(self) -> None:
        for process in self._processes.values():
            process.close()


def _next_done(process: EncodingProcess) -> Task:
    try:
        return cast(Task, process.receive())
    except RuntimeError as error:
        raise ValueError(f"{error}; what is encoded is kept: run the same command to encode the rest") from error
