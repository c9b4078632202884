"""A process of its own that loads an encoder once and fills the blocks of target stores that it is told.

It may be killed at any moment: what it wrote stays valid, and what it was writing counts as not there. It ends with its
parent, however that ends. On CUDA it needs no stream of its own: it shares the GPU with other processes as the driver
divides the time, and torch's default stream has the lowest priority there is.
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
from typing import ClassVar

from megatron_sfr.data.prepared.open import open_prepared
from megatron_sfr.data.targets.fill import Filling, TextEncoder
from megatron_sfr.data.targets.store import EncoderIdentity
from megatron_sfr.runtime.lifetime import end_with_parent

OPEN, URGENT, AHEAD = 0, 1, 2  # in this order
CLAIMED_WAIT = 0.002  # seconds before a block that another process is encoding is looked at again


@dataclass(frozen=True)
class Open:
    """A store to be filled, and the number that tasks know it by."""

    number: int
    store: Path
    prepared: Path
    completes: bool  # whether to make it complete when the last row is there
    priority: ClassVar[int] = OPEN


@dataclass(frozen=True)
class Task:
    """A block of a store to be filled; urgent ones come first, else as they were given."""

    store: int
    block: int
    priority: int = AHEAD


@dataclass(frozen=True)
class Completed:
    """A store that has become complete, or was found to be."""

    store: int


@dataclass(frozen=True)
class Failed:
    """Why a process ended: one line."""

    reason: str


Message = EncoderIdentity | Task | Completed  # what a process says: of its encoder, first; a task that is done


class EncodingProcess:
    """The parent's end; `receive` when `connection` has something to read."""

    def __init__(self, make_encoder: Callable[[], TextEncoder], *, threads: int | None = None) -> None:
        """make_encoder is pickled and called there; threads: of torch in the process, None as torch chooses."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, make_encoder, threads)
        self._process = context.Process(target=_serve, args=arguments, name="encoder", daemon=True)
        self._process.start()
        theirs.close()  # so that a process that ends is the end of the messages

    def give(self, task: Open | Task) -> None:
        with suppress(OSError):  # it has ended: the next message says why
            self.connection.send(task)

    def receive(self) -> Message:
        """The next message, waited for; RuntimeError of one line where the process failed or was killed."""
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

    def kill(self) -> None:
        """Ends it, which loses nothing that it wrote; what it said before can still be received."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Nobody may be waiting for a message."""
        self.kill()
        self.connection.close()


def identity_of(make_encoder: Callable[[], TextEncoder]) -> EncoderIdentity:
    """Of an encoder that this process has no other use for: it is loaded in one that ends again."""
    process = EncodingProcess(make_encoder)
    try:
        identity = process.receive()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    finally:
        process.close()
    assert isinstance(identity, EncoderIdentity), "it comes first"
    return identity


class Queued:
    """What the parent has sent, in the order in which it is to be done: of two of one priority, the one put first."""

    _number = itertools.count()

    def __init__(self, message: Open | Task) -> None:
        self.message = message
        self._key = (message.priority, next(Queued._number))

    def __lt__(self, other: Queued) -> bool:
        return self._key < other._key


Queue = PriorityQueue[Queued]


def _serve(connection: Connection, make_encoder: Callable[[], TextEncoder], threads: int | None) -> None:
    """The main function of the process."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    queue: Queue = PriorityQueue()
    threading.Thread(target=_receive, args=(connection, queue), daemon=True).start()
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        encoder = make_encoder()
        connection.send(encoder.identity)
        _fill_as_told(connection, queue, encoder)
    except Exception as error:
        with suppress(OSError):  # the parent has ended
            connection.send(Failed(_one_line(error)))


def _fill_as_told(connection: Connection, queue: Queue, encoder: TextEncoder) -> None:
    stores: dict[int, Filling] = {}
    unfinished: dict[int, Filling] = {}  # those to be completed
    while True:
        task = queue.get().message
        if isinstance(task, Open):
            stores[task.number] = Filling(task.store, open_prepared(task.prepared))
            if task.completes:
                unfinished[task.number] = stores[task.number]
        elif _fill(stores[task.store], task.block, encoder):
            connection.send(task)
        else:
            queue.put(Queued(task))
            time.sleep(CLAIMED_WAIT)
        if queue.empty():
            for store in [store for store, filling in unfinished.items() if filling.all_begun()]:
                _complete(unfinished.pop(store), encoder)
                connection.send(Completed(store))


def _fill(filling: Filling, block: int, encoder: TextEncoder) -> bool:
    try:
        return filling.fill(block, encoder)
    except Exception as error:
        raise ValueError(f"{filling.store.folder}, block {block}: {_one_line(error)}") from error


def _complete(filling: Filling, encoder: TextEncoder) -> None:
    """Rows that a power failure tore in an earlier run are found here, if nobody has asked for them."""
    for block in filling.blocks_of(filling.complete()):
        _fill(filling, block, encoder)
    filling.finish()


def _one_line(error: Exception) -> str:
    """As the last line of a traceback; of errors made for users, only what they say."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _receive(connection: Connection, queue: Queue) -> None:
    """Takes what the parent sends at once, so that it never waits; an urgent task is seen after the block at hand."""
    while True:
        try:
            queue.put(Queued(connection.recv()))
        except (EOFError, OSError):
            os._exit(0)
