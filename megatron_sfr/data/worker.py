"""A process of its own that loads an encoder once and fills the blocks of target stores that it is told.

It may be killed at any moment: what it wrote stays valid, and what it was writing counts as not there. It ends with its
parent, however that ends.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import PriorityQueue
from typing import Any

from megatron_sfr.data.documents import open_prepared
from megatron_sfr.data.filling import Filling, TextEncoder, check_encoder
from megatron_sfr.data.targets import EncoderIdentity

URGENT, AHEAD = 0, 1
CLAIMED_WAIT = 0.002  # seconds before a block that another process is encoding is looked at again
PARENT_CHECK = 0.5  # seconds between looks whether the parent is still there


@dataclass(frozen=True)
class Task:
    """A block of a store to be filled; urgent ones come first, else as they were given."""

    store: Path
    prepared: Path
    block: int
    priority: int = AHEAD


@dataclass(frozen=True)
class Failed:
    """Why a process ended: one line."""

    reason: str


class EncodingProcess:
    """The parent's end. Messages come in `connection`: an EncoderIdentity, then each Task that is done, or a Failed."""

    def __init__(self, make_encoder: Callable[[], TextEncoder], *, threads: int | None = None) -> None:
        """make_encoder is pickled and called there; threads: of torch in the process, None as torch chooses."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, make_encoder, threads, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, name="encoder", daemon=True)
        self._process.start()
        theirs.close()  # so that a process that ends is the end of the messages

    def give(self, task: Task) -> None:
        with suppress(OSError):  # it has ended: the next message says why
            self.connection.send(task)

    def receive(self) -> EncoderIdentity | Task:
        """The next message, when there is one; RuntimeError of one line where the process failed or was killed."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=5)
            raise RuntimeError(f"the encoding process ended with exit code {self._process.exitcode}") from error
        if isinstance(message, Failed):
            raise RuntimeError(message.reason)
        return message

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def close(self) -> None:
        """Kills it, which loses nothing that it wrote."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, make_encoder: Callable[[], TextEncoder], threads: int | None, parent: int) -> None:
    """The life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        encoder = make_encoder()
        connection.send(encoder.identity)
        _fill_as_told(connection, encoder)
    except Exception as error:
        text = " ".join(str(error).split())
        named = isinstance(error, ValueError | OSError)
        connection.send(Failed(text if named else f"{type(error).__name__}: {text}"))


def _fill_as_told(connection: Connection, encoder: TextEncoder) -> None:
    queue: PriorityQueue[tuple[int, int, Task]] = PriorityQueue()
    number = itertools.count()
    threading.Thread(target=_receive, args=(connection, queue, number), daemon=True).start()
    stores: dict[Path, Filling] = {}
    while True:
        priority, _, task = queue.get()
        if task.store not in stores:
            stores[task.store] = Filling(task.store, open_prepared(task.prepared))
            check_encoder(stores[task.store].store, encoder.identity)
        if stores[task.store].fill(task.block, encoder):
            connection.send(task)
        else:
            queue.put((priority, next(number), task))
            time.sleep(CLAIMED_WAIT)


def _receive(connection: Connection, queue: PriorityQueue[Any], number: itertools.count[int]) -> None:
    """Takes what the parent sends at once, so that it never waits; an urgent task is seen after the block at hand."""
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        queue.put((task.priority, next(number), task))


def _end_with(parent: int) -> None:
    """A process that the parent forked holds the connection open too, so its end alone would not be noticed."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(0)
