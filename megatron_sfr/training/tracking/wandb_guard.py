"""Lets a training outlive its W&B writer: what fails there costs the rest of the log in W&B, not the run.

Upstream calls the writer at each step and after each save, and an exception of it ends the run. W&B's own process sends
the data; if that is killed, every later call fails.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, wrapper
from megatron_sfr.storage.user_files import reason

LOGGER = logging.getLogger(__name__)
FINISH = {"WANDB_FINISH_TIMEOUT": "120"}
"""Variable that bounds the wait at the end for data that are not sent yet, in seconds, unless the user sets it. W&B's
default is to wait until its server can be reached. It is read when the writer starts."""


class GuardedWandb:
    """The wandb module, as upstream's writer. After its first failure it is false, and drops what is logged."""

    def __init__(self, wandb: Any) -> None:
        self._wandb, self._lost = wandb, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wandb, name)

    def __bool__(self) -> bool:
        return not self._lost

    def log(self, *args: Any, **options: Any) -> None:
        self.attempt(lambda: self._wandb.log(*args, **options))

    def finish(self, *args: Any, **options: Any) -> None:
        self.attempt(lambda: self._wandb.finish(*args, **options))

    def attempt(self, call: Callable[[], object]) -> None:
        """Calls W&B, unless it has failed before. A failure is a warning."""
        if self._lost:
            return
        try:
            call()
        except Exception as error:  # of sockets, protobuf, the file system, and W&B's own
            self._lost = True
            LOGGER.warning(
                "warning: W&B fails, and gets nothing more of this run (%s); metrics.jsonl and TensorBoard have all "
                "metrics, and `wandb sync` sends what was logged before",
                reason(error),
            )


def replacements() -> tuple[Replacement, ...]:
    """The names of upstream that are replaced on the rank that has a W&B writer."""
    from megatron.training.global_vars import get_wandb_writer

    why = "lets an exception of W&B end the training"
    return (
        Replacement("megatron.training.global_vars", "_GLOBAL_WANDB_WRITER", wrapper(GuardedWandb), why),
        Replacement(
            "megatron.core.timers",
            "wandb",
            wrapper(lambda _: get_wandb_writer()),
            "logs times to a writer that equals this module: the guard is not equal, and the module was not imported",
        ),
        Replacement("megatron.training.wandb_utils", "on_save_checkpoint_success", wrapper(_guarded), why),
    )


def _guarded(log_artifact: Callable[..., None]) -> Callable[..., None]:
    """Upstream's function after a save, which logs the checkpoint as an artifact."""

    @functools.wraps(log_artifact)
    def guarded(*args: Any, **options: Any) -> None:
        from megatron.training.global_vars import get_wandb_writer

        writer: Any = get_wandb_writer()
        writer.attempt(lambda: log_artifact(*args, **options))

    return guarded
