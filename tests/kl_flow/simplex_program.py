"""Run as ranks: writes this rank's shard of seeded points of the simplex to FOLDER/RANK.pt; argv: FOLDER.

Shapes: B samples, N positions, V columns of the shard.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.corruption import KLFlowOptions, draw_time, noisy_point

SIZE, COLUMNS = 9, 16  # of 4 shards the third has 3 padding columns, the fourth only padding


def points(vocab: Vocab, width: int) -> torch.Tensor:
    """The shard [B, N, V] of 3 texts of 6 tokens, some of which are given."""
    options, sample_B = KLFlowOptions(t_max=0.9), torch.tensor([3, 2**40, 7])
    text_BN = torch.arange(18).view(3, 6) % SIZE
    free_BN = torch.arange(18).view(3, 6) % 4 != 0
    return noisy_point(text_BN, free_BN, draw_time(sample_B, options), sample_B, vocab, width, options)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, width = dist.get_rank(), COLUMNS // dist.get_world_size()
    torch.save(points(Vocab(SIZE, rank * width, dist.group.WORLD), width), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
