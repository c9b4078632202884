"""Reads denoisers and writes what each makes of seeded points: logits [B, S, V] to logits.pt in its folder.

argv: the folders of checkpoints.

Shapes: B samples, S positions, V tokens.
"""

import sys
from pathlib import Path

import torch

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.checkpoint import load_denoiser
from megatron_sfr.kl_flow.model import denoise


@torch.inference_mode()
def main(folder: Path) -> None:
    model, args = load_denoiser(folder, "cpu")
    vocab = Vocab(args.vocab_size)
    x_BSV = torch.randn(2, 20, args.vocab_size, generator=torch.Generator().manual_seed(1)).mul(4).softmax(-1)
    x_BSV = torch.nn.functional.pad(x_BSV, (0, args.padded_vocab_size - args.vocab_size))
    t_B, later_B = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.29])
    changed_BSV = torch.cat([x_BSV[:, :-1], x_BSV[:, :1]], dim=1)
    found = {
        "plain": denoise(model, x_BSV, t_B, vocab),
        "last changed": denoise(model, changed_BSV, t_B, vocab),
        "reversed": denoise(model, x_BSV.flip(1), t_B, vocab),
        "later": denoise(model, x_BSV, later_B, vocab),
    }
    assert all((z_BSV[..., args.vocab_size :] == -torch.inf).all() for z_BSV in found.values())
    torch.save({name: z_BSV[..., : args.vocab_size].clone() for name, z_BSV in found.items()}, folder / "logits.pt")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        main(path)
