"""Checks before each save that the disk has room for the checkpoint, so that a run does not end inside of one.

The size is that of the run's newest complete checkpoint or, for the first one, that of the state in memory.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.hf.megatron.tracker import Newest, newest
from megatron_sfr.runtime.parallel import context_size, data_size, largest_of_all, sum_of_all
from megatron_sfr.runtime.replacements import Replacement, wrapper

MARGIN = 1.02
SMALL_FILES = 1 << 20
"""Bytes of what a checkpoint has beside its tensors."""


def replacements(save: Path) -> list[Replacement]:
    """The replaced name of upstream: all ranks check the room together, before any of them writes."""

    def with_room(upstreams: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstreams)
        def check_and_save(iteration: int, model: Any, optimizer: Any, *rest: Any, **options: Any) -> Any:
            if not options.get("non_persistent_ckpt") and "://" not in str(save):
                check_room(save, iteration, model, optimizer)
            return upstreams(iteration, model, optimizer, *rest, **options)

        return check_and_save

    return [
        Replacement(
            "megatron.training.training",
            "save_checkpoint",
            wrapper(with_room),
            "writes until the disk is full, and leaves what it has written",
            ("iteration", "model", "optimizer"),
        )
    ]


def check_room(save: Path, iteration: int, model: Any, optimizer: Any) -> None:
    """Raises ValueError, on all ranks, if the next checkpoint does not fit the disk. A collective call.

    Args:
        save: the folder of the run's checkpoints.
        model: this rank's model chunks.
        optimizer: upstream's.
    """
    first = torch.distributed.get_rank() == 0
    previous = size_of(save) if first else 0
    (size,) = largest_of_all([float(previous)])
    if not size:
        size = MARGIN * sum_of_all(state_bytes(model, optimizer)) + SMALL_FILES
    (free,) = largest_of_all([float(shutil.disk_usage(save).free) if first else 0.0])
    if size > free:
        found = newest_checkpoint(save)
        raise ValueError(
            f"{save} has {free / 1e9:.3g} GB free, and the checkpoint of step {iteration} needs {size / 1e9:.3g} GB: "
            "it was not begun; free some room or set keep_checkpoints, and the run resumes from "
            f"{f'step {found.step}' if found else 'its beginning'}"
        )


def size_of(save: Path) -> int:
    """Bytes of the newest complete checkpoint in a folder; 0 if there is none."""
    found = newest_checkpoint(save)
    return sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file()) if found else 0


def newest_checkpoint(save: Path) -> Newest | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    try:
        return newest(save, any_format=True)
    except ValueError:  # the tracker names nothing that is complete
        return None


def state_bytes(model: Any, optimizer: Any) -> float:
    """This rank's part of the bytes that a checkpoint has: state that several ranks hold counts once among them."""
    from megatron.core import parallel_state
    from megatron.training.global_vars import get_args

    args, copies = get_args(), data_size() * context_size()
    total = 0.0
    for p in (p for chunk in model for p in chunk.parameters()):
        if args.lora_rank is None or p.requires_grad:
            dense = getattr(p, "allreduce", True)
            total += p.nbytes / (copies if dense else parallel_state.get_expert_data_parallel_world_size())
    if args.no_save_optim or optimizer is None:
        return total
    known = {p.data_ptr() for chunk in model for p in chunk.parameters()}
    state = sum(x.nbytes for x in _states(optimizer) if x.numel() > 1 and x.data_ptr() not in known)
    return total + state / (1 if args.use_distributed_optimizer else copies)


def _states(optimizer: Any) -> Iterator[Tensor]:
    """The parameters that the optimizer changes, and their moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for p, state in getattr(part, "optimizer", part).state.items():
            yield p
            yield from (x for x in state.values() if isinstance(x, Tensor))
