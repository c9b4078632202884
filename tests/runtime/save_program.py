"""Run as a rank: saves twice with upstream, synchronously, and prints how many processes that started.

argv: an empty folder.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_sfr.runtime import backend
from megatron_sfr.runtime.replacements import replaced
from megatron_sfr.runtime.synchronous_save import REPLACEMENTS


def state(weight: torch.Tensor) -> dict[str, ShardedTensor]:
    return {"weight": ShardedTensor.from_rank_offsets("weight", weight)}


def main(folder: Path) -> None:
    backend.start("cpu")
    weight = torch.arange(6.0)
    with replaced(REPLACEMENTS):
        for step in ("1", "2"):
            (folder / step).mkdir()
            dist_checkpointing.save(state(weight * int(step)), folder / step)
    print("processes:", len(multiprocessing.active_children()))
    found = dist_checkpointing.load(state(torch.zeros(6)), folder / "2")
    print("equal:", torch.equal(found["weight"], weight * 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
