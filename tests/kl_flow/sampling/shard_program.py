"""Run as ranks: writes samples of a toy language with a sharded vocabulary to FOLDER/RANK.pt. argv: FOLDER.

Shapes: B rows, S positions, V tokens, W columns of the shard.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.sampling.sampler_options import METHODS, SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import Canvas, sample
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from tests.kl_flow.sampling.languages import language

SIZE, COLUMNS = 6, 12  # of 3 shards the second has two padding columns, the third only padding
ROWS, LENGTH = 40, 5


def run(method: str, top_k: int, vocab: Vocab, width: int) -> Tensor:
    """Tokens [B, S] from a denoiser that gathers the point and returns this shard's columns of its logits."""
    toy = language(size=SIZE)

    def denoise(x_BSW: Tensor, t_B: Tensor) -> Tensor:
        x_RNW = vocab.gather(x_BSW.flatten(0, 1))
        x_BSV = x_RNW.transpose(0, 1).flatten(1)[:, :SIZE].unflatten(0, x_BSW.shape[:2])
        assert torch.allclose(x_BSV.sum(dim=-1), torch.ones(()))
        logits_BSC = torch.full((*x_BSV.shape[:2], COLUMNS), torch.nan, dtype=torch.float64)
        logits_BSC[..., :SIZE] = toy.denoise(x_BSV, t_B)
        return logits_BSC[..., vocab.start : vocab.start + width]

    free_BS = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    free_BS[::3, 2:4] = False
    canvas = Canvas(torch.full((ROWS, LENGTH), 5), free_BS, torch.arange(ROWS))
    options = SamplerOptions(method, 12, top_k=top_k, final_top_k=top_k, t_max=0.6, t_split=0.3)  # type: ignore[arg-type]
    return sample(denoise, canvas, Shard(vocab, width), toy.simplex, options)


def run_all(vocab: Vocab, width: int) -> dict[Any, Tensor]:
    return {(method, top_k): run(method, top_k, vocab, width) for method in METHODS for top_k in (0, 1, 3)}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, width = dist.get_rank(), COLUMNS // dist.get_world_size()
    torch.save(run_all(Vocab(SIZE, rank * width, dist.group.WORLD), width), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
