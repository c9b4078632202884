"""Under torchrun: trains several recipes one after another in one start. argv: a JSON list of argument lists.

Each run has process groups of its own and leaves none behind: gloo's threads would pile up.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_sfr.runtime import backend
from megatron_sfr.train import main


def meet(place: Path) -> None:
    """Makes the default process group; rank 0 takes a free port and says in a file which."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        store = dist.TCPStore("localhost", 0, ranks, is_master=True, wait_for_workers=False)
        partial = place.with_suffix(".partial")
        partial.write_text(str(store.port), encoding="utf-8")
        partial.rename(place)
    else:
        while not place.exists():
            time.sleep(0.01)
        store = dist.TCPStore("localhost", int(place.read_text(encoding="utf-8")), ranks, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


if __name__ == "__main__":
    backend.prepare(["--sfr-backend", "cpu"])
    from megatron.training.training import destroy_global_state

    listing = Path(sys.argv[1])
    for i, argv in enumerate(json.loads(listing.read_text(encoding="utf-8"))):
        meet(listing.with_suffix(f".{i}.port"))
        try:
            main(argv)
        except SystemExit as end:  # how upstream ends a run at --exit-interval
            if end.code:
                raise
        destroy_global_state()
        dist.destroy_process_group()
