"""Checks before each save that all weights are finite, so that no checkpoint is written that no run can resume from.

Upstream checks the loss and the gradients of a step, not what the optimizer makes of them: the checkpoint of that step
would hold NaN or infinity, and with `keep_checkpoints` replace an older one.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.nn.utils import get_total_norm

from megatron_sfr.hf.megatron.disk_room import newest_checkpoint
from megatron_sfr.runtime.parallel import largest_of_all
from megatron_sfr.runtime.replacements import Replacement, wrapper


def replacements(save: Path) -> list[Replacement]:
    """The replaced name of upstream: all ranks check their weights together, before any of them writes."""

    def with_check(upstreams: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstreams)
        def check_and_save(iteration: int, model: Any, *rest: Any, **options: Any) -> Any:
            check_weights(save, iteration, model)
            return upstreams(iteration, model, *rest, **options)

        return check_and_save

    return [
        Replacement(
            "megatron.training.training",
            "save_checkpoint",
            wrapper(with_check),
            "saves weights that are NaN or infinite",
            ("iteration", "model"),
        )
    ]


def check_weights(save: Path, iteration: int, model: Any) -> None:
    """Raises ValueError, on all ranks, if a weight is NaN or infinite. A collective call.

    Args:
        save: the folder of the run's checkpoints.
        iteration: the training step.
        model: this rank's model chunks.
    """
    weights = [p.detach() for chunk in model for p in chunk.parameters() if p.numel()]
    largest = float(get_total_norm(weights, math.inf))
    (wrong,) = largest_of_all([float(not math.isfinite(largest))])
    if wrong:
        found = newest_checkpoint(save)
        start = f"step {found.step}" if found else "its beginning"
        raise ValueError(
            f"weights are NaN or infinite after step {iteration}, which was not saved: lower lr, and the run resumes "
            f"from {start}"
        )
