"""Lets upstream save a checkpoint synchronously without starting a process.

Upstream collects what a save wrote in a queue of a multiprocessing manager, which an asynchronous save needs: another
process writes. A synchronous save writes in its own process, but still starts the manager, which imports torch when
the first result arrives: on each rank several seconds in the first save, and 0.5 GB from then on.
"""

import functools
import queue
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, replaced, wrapper

QUEUE = Replacement(
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "get_write_results_queue",
    queue.Queue,
    "starts a multiprocessing manager, which a synchronous save does not need",
)


@wrapper
def _without_manager(save: Any) -> Any:
    @functools.wraps(save)
    def saved(*args: Any, **kwargs: Any) -> Any:
        with replaced([QUEUE]):
            return save(*args, **kwargs)

    return saved


REPLACEMENTS = (
    Replacement(
        "megatron.core.dist_checkpointing.strategies.torch",
        "TorchDistSaveShardedStrategy.save",
        _without_manager,
        "collects its results through a process",
    ),
)
