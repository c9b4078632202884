"""Run as ranks: writes the results of every loss on this rank's shard of seeded logits to FOLDER/RANK.pt.

argv: FOLDER.

Shapes: T tokens, V columns of the shard.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.anchored.asft import ASFT
from megatron_sfr.objectives.token.token_loss import token_values
from tests.objectives.token.token_cases import ALL_LOSSES, labels, logits, reference

TOKENS, SIZE, COLUMNS = 40, 11, 16  # of 4 shards the third has one padding column, the fourth only padding
ANCHORED = {f"asft of {k}": ASFT(weight=0.3).at(reference(TOKENS, SIZE, k)) for k in (1, 4, SIZE)}
TRIED = ALL_LOSSES | ANCHORED


class Collectives(TorchDispatchMode):
    """Records the names of the collectives called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def all_logits(grid: bool) -> torch.Tensor:
    """Logits of the whole vocabulary; padding columns are NaN."""
    z_TV = logits(TOKENS, COLUMNS, seed=11, grid=grid)
    z_TV[:, SIZE:] = torch.nan
    return z_TV


def run(name: str, grid: bool, vocab: Vocab, columns: slice) -> dict[str, Any]:
    """Loss, cross-entropy and gradient on some columns of the logits, and the collectives of both passes."""
    z_TV = all_logits(grid)[:, columns].clone().requires_grad_()
    weight_T = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
    with Collectives() as forward:
        values = token_values(z_TV, labels(TOKENS, SIZE, ignored=0.2), TRIED[name], vocab)
    with Collectives() as backward:
        (values.loss * weight_T).sum().backward()
    actual = {name: value.detach() for name, value in values._asdict().items()} | {"gradient": z_TV.grad}
    return actual | {"forward": forward.names, "backward": backward.names}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, width = dist.get_rank(), COLUMNS // dist.get_world_size()
    vocab = Vocab(SIZE, rank * width, dist.group.WORLD)
    columns = slice(rank * width, (rank + 1) * width)
    actual = {(name, grid): run(name, grid, vocab, columns) for name in TRIED for grid in (False, True)}
    torch.save(actual, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
