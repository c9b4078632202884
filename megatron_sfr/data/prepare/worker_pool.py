"""Maps chunks in several processes: results in order, a bounded number of chunks in memory."""

from __future__ import annotations

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from megatron_sfr.runtime.lifetime import end_with_parent

MOST_BY_DEFAULT = 8
AHEAD = 2  # chunks for each worker, waiting or done


def default_workers() -> int:
    """One for each processor that this process may use, at most 8."""
    return min(MOST_BY_DEFAULT, len(os.sched_getaffinity(0)))


def ordered_map[T, R](work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """Yields work(item) for each item, in order, computed in spawned processes.

    `work` is pickled once for each worker. At most AHEAD * workers items and results are held, however slowly they are
    taken. Close the iterator (contextlib.closing) to end the workers early.

    Raises:
        ValueError: a worker died.
    """
    waiting: deque[Future[R]] = deque()
    with ExitStack() as stack:
        idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(workers):
            idle.put(_start(work, stack))
        threads = ThreadPoolExecutor(workers)  # a thread for each worker, which only waits for it
        stack.callback(threads.shutdown, cancel_futures=True)
        try:
            for item in items:
                waiting.append(threads.submit(_call, idle, item))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (EOFError, ConnectionError) as error:
            raise ValueError(
                "a worker process died, most likely because memory ran out; "
                f"run it again with fewer --workers than {workers}: the same command resumes it"
            ) from error


def _start(work: Callable[[Any], Any], stack: ExitStack) -> Connection:
    """The connection to a new worker process, which ends with `stack`."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()  # only the worker holds it, so that a dead worker is noticed
    stack.callback(process.join)
    stack.callback(ours.close)  # first: the worker ends once it is closed
    return ours


def _call(idle: SimpleQueue[Connection], item: Any) -> Any:
    """The result of an idle worker. Raises what it raised; EOFError or ConnectionError if it died."""
    worker = idle.get()
    try:
        worker.send(item)
        result, error = worker.recv()
    finally:
        idle.put(worker)
    if error is not None:
        raise error
    return result


def _serve(work: Callable[[Any], Any], connection: Connection) -> None:
    """A worker process: answers with (result, None) or (None, error) until the connection is closed."""
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result, error = work(item), None
        except Exception as failure:
            failure.add_note(traceback.format_exc())
            result, error = None, failure
        connection.send((result, error))
