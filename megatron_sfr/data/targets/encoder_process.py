"""A process that loads an encoder once and fills blocks of target stores on request.

It may be killed at any moment: what it wrote stays valid, and what it was writing counts as missing. It ends with its
parent, however that ends. On CUDA it needs no separate stream: the driver divides the GPU's time among processes, and
torch's default stream already has the lowest priority.
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
from megatron_sfr.data.targets.fill import StoreWriter, TextEncoder
from megatron_sfr.data.targets.store import EncoderIdentity
from megatron_sfr.runtime.lifetime import end_with_parent

OPEN, URGENT, AHEAD = 0, 1, 2  # priorities: lower ones come first
CLAIMED_WAIT = 0.002  # seconds before a block that another process encodes is tried again


@dataclass(frozen=True)
class Open:
    """A store to fill, and its number in tasks."""

    number: int
    store: Path
    prepared: Path
    completes: bool
    """Whether to complete the store after its last embedding."""
    priority: ClassVar[int] = OPEN


@dataclass(frozen=True)
class Task:
    """A block of a store to fill. Urgent ones come first, others in the order in which they were given."""

    store: int
    block: int
    priority: int = AHEAD


@dataclass(frozen=True)
class Completed:
    """A store is complete."""

    store: int


@dataclass(frozen=True)
class Failed:
    """Why a process ended: one line."""

    reason: str


Message = EncoderIdentity | Task | Completed  # from a process: its encoder, first; then tasks that are done


class EncodingProcess:
    """The parent's end. Call `receive` when `connection` has something to read."""

    def __init__(self, make_encoder: Callable[[], TextEncoder], *, threads: int | None = None) -> None:
        """make_encoder is pickled and called there; threads: of torch in the process, None as torch chooses."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, make_encoder, threads)
        self._process = context.Process(target=_serve, args=arguments, name="encoder", daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the messages

    def give(self, task: Open | Task) -> None:
        with suppress(OSError):  # the process has ended: the next message says why
            self.connection.send(task)

    def receive(self) -> Message:
        """Waits for the next message. Raises RuntimeError, in one line, if the process failed or was killed."""
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
        """Ends the process. What it wrote is kept, and messages that it sent can still be received."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Ends the process and closes the connection. No thread may be waiting for a message."""
        self.kill()
        self.connection.close()


class Queued:
    """A message of the parent, ordered by priority and then by time."""

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the group: the parent decides
    queue: Queue = PriorityQueue()
    threading.Thread(target=_receive, args=(connection, queue), daemon=True).start()
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        encoder = make_encoder()
        connection.send(encoder.identity)
        _answer(connection, queue, encoder)
    except Exception as error:
        with suppress(OSError):  # the parent has ended
            connection.send(Failed(_one_line(error)))


def _answer(connection: Connection, queue: Queue, encoder: TextEncoder) -> None:
    stores: dict[int, StoreWriter] = {}
    unfinished: dict[int, StoreWriter] = {}  # to be completed
    while True:
        task = queue.get().message
        if isinstance(task, Open):
            stores[task.number] = StoreWriter(task.store, open_prepared(task.prepared))
            if task.completes:
                unfinished[task.number] = stores[task.number]
        elif _fill(stores[task.store], task.block, encoder):
            connection.send(task)
        else:
            queue.put(Queued(task))
            time.sleep(CLAIMED_WAIT)
        if queue.empty():
            for store in [store for store, writer in unfinished.items() if writer.all_begun()]:
                _complete(unfinished.pop(store), encoder)
                connection.send(Completed(store))


def _fill(writer: StoreWriter, block: int, encoder: TextEncoder) -> bool:
    try:
        return writer.fill(block, encoder)
    except Exception as error:
        raise ValueError(f"{writer.store.folder}, block {block}: {_one_line(error)}") from error


def _complete(writer: StoreWriter, encoder: TextEncoder) -> None:
    """Completes a store. Encodes again embeddings that a power failure damaged in an earlier run."""
    for block in writer.blocks_of(writer.complete()):
        _fill(writer, block, encoder)
    writer.finish()


def _one_line(error: Exception) -> str:
    """The message of a ValueError; of other errors also the type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _receive(connection: Connection, queue: Queue) -> None:
    """Receives messages at once, so that the parent never waits. An urgent task follows the current block."""
    while True:
        try:
            queue.put(Queued(connection.recv()))
        except (EOFError, OSError):
            os._exit(0)
