"""Maps chunks in several processes: results in order, a bounded number of chunks in memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from megatron_sfr.runtime.failures import killed_workers
from megatron_sfr.runtime.lifetime import end_with_parent

MOST_BY_DEFAULT = 8
AHEAD = 2  # chunks for each worker, waiting or done
_WORK: list[Callable[[Any], Any]] = []
"""In a worker process: its work."""


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
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (work,))
    with killed_workers(f"run it again with fewer --workers than {workers}: the same command resumes it"):
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """Makes a process a worker."""
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    _WORK.append(work)


def _call(item: Any) -> Any:
    return _WORK[0](item)
