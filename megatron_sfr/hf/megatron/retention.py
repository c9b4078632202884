"""Deletes a run's older checkpoints after each save: `keep_checkpoints`, `keep_every`.

Only complete checkpoints count and are deleted. A checkpoint is renamed before it is deleted, so that a kill in between
leaves nothing that looks like a checkpoint.
"""

import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sfr.hf.megatron.tracker import complete_steps, step_folder
from megatron_sfr.runtime.replacements import Replacement, wrapper

_DELETING = ".deleting"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetentionOptions:
    """Which checkpoints of a run are kept."""

    keep_checkpoints: int | None = None
    """Number of the newest checkpoints to keep: after each save, older ones are deleted. Incomplete ones are neither
    counted nor deleted. Default: keep all."""
    keep_every: int | None = None
    """With keep_checkpoints: also keep the checkpoints whose step is a multiple of this number. Default: none."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` = {value}: give at least 1, or leave it out")
        if self.keep_every is not None and self.keep_checkpoints is None:
            raise ValueError("`keep_every` has no effect without keep_checkpoints: set that, or leave it out")

    def obsolete(self, steps: Sequence[int]) -> list[int]:
        """The steps among those of complete checkpoints that are not kept."""
        if self.keep_checkpoints is None:
            return []
        older = sorted(steps, reverse=True)[self.keep_checkpoints :]
        return [step for step in older if not self.keep_every or step % self.keep_every]


def delete_obsolete(save: Path, options: RetentionOptions) -> list[int]:
    """Deletes the checkpoints in SAVE that are not kept; returns their steps. What cannot be deleted is logged.

    Also removes what a kill left of an earlier deletion.
    """
    deleted = []
    for step in options.obsolete(complete_steps(save)):
        folder = save / step_folder(step)
        try:
            folder.rename(folder.with_name(folder.name + _DELETING))
            deleted.append(step)
        except OSError as error:
            LOGGER.warning("cannot delete the checkpoint %s: %s", folder, error)
    for folder in save.glob(f"iter_*{_DELETING}"):
        shutil.rmtree(folder, onexc=lambda _, path, error: LOGGER.warning("cannot delete %s: %s", path, error))
    return deleted


def replacements(save: Path, options: RetentionOptions) -> list[Replacement]:
    """The replaced name of upstream, if checkpoints are to be deleted: global rank 0 does it after each save."""
    if options.keep_checkpoints is None:
        return []

    def then_delete(upstreams: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstreams)
        def save_and_delete(*args: Any, **kwargs: Any) -> Any:
            result = upstreams(*args, **kwargs)
            if torch.distributed.get_rank() == 0:
                delete_obsolete(save, options)
            return result

        return save_and_delete

    return [
        Replacement(
            "megatron.training.training",
            "save_checkpoint",
            wrapper(then_delete),
            "keeps all checkpoints, or one in save_retain_interval",
        )
    ]
