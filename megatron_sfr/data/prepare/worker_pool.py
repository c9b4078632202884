"""Maps chunks in several processes: results in order, a bounded number of chunks in memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_sfr.runtime.lifetime import end_with_parent

MOST_BY_DEFAULT = 8
AHEAD = 2  # chunks for each worker, waiting or done


def default_workers() -> int:
    """One for each processor that this process may use, at most 8."""
    return min(MOST_BY_DEFAULT, len(os.sched_getaffinity(0)))


def ordered_map[T, R](work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """Yields work(item) for each item, in order: in this process for one worker, otherwise in spawned processes.

    `work` is pickled once for each worker. At most AHEAD * workers items and results are held, however slowly they are
    taken. Close the iterator (contextlib.closing) to end the workers early.

    Raises:
        ValueError: a worker died.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (work,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, most likely because memory ran out; "
            f"run it again with fewer --workers than {workers}: the same command resumes it"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of this worker process


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    end_with_parent()
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers


def _do(item: Any) -> Any:
    return _work(item)
