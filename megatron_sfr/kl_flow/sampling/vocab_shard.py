"""Softmax and sampling over a vocabulary that is sharded over ranks. All ranks draw the same tokens.

Shapes: F positions, W columns of the local shard including padding, R ranks, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab, sharded_softmax
from megatron_sfr.kl_flow.simplex_path import log_dirichlet


@dataclass(frozen=True)
class Keys:
    """Keys of the noise of each position: sample number and position in the sequence, int64 [F]."""

    seed: int
    sample_F: Tensor
    position_F: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Keys":
        return Keys(self.seed, self.sample_F[rows], self.position_F[rows])

    def log_exponentials(self, draw: int, width: int, *, start: int = 0, stream: int) -> Tensor:
        """ln E of independent E ~ Exp(1): [F, width], for the columns from `start` on."""
        step = torch.full_like(self.sample_F, draw)
        return log_dirichlet(self.seed, self.sample_F, self.position_F, step, width, start=start, stream=stream)


@dataclass(frozen=True)
class Shard:
    """This rank's columns of the vocabulary. Padding columns are -inf in logits and 0 in probabilities."""

    vocab: Vocab
    width: int
    """Number of columns of this shard including padding; equal on all ranks."""

    def without_padding(self, z_FW: Tensor) -> Tensor:
        """Writes -inf into the padding columns, in place."""
        z_FW[:, self.vocab.real(z_FW).shape[1] :] = -torch.inf
        return z_FW

    def softmax(self, l_FW: Tensor) -> Tensor:
        """This rank's columns of the softmax over the whole vocabulary; gathers each shard's maximum and sum."""
        return sharded_softmax(l_FW.clone(), self.vocab)

    def likeliest(self, z_FW: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely token, int64 [F], and its logit [F]. Ties go to the first token."""
        value_F, column_F = z_FW.max(dim=-1)
        token_F = column_F + self.vocab.start
        pairs_RF2 = self.vocab.gather(torch.stack([value_F.double(), token_F.double()], dim=-1))
        value_F, rank_F = pairs_RF2[..., 0].max(dim=0)
        return pairs_RF2[..., 1].gather(0, rank_F[None])[0].long(), value_F

    def draw(self, z_FW: Tensor, top_k: int, temperature: float, keys: Keys, number: int, stream: int) -> Tensor:
        """Draws tokens ~ softmax(z / temperature) among the top_k most likely (1: argmax; 0: all), int64 [F].

        Gumbel-max: argmax_i z_i / temperature - ln E_i with E_i ~ Exp(1). E_i is keyed by the position, so that neither
        the batch nor the number of ranks changes a draw.
        """
        if top_k == 1:
            return self.likeliest(z_FW)[0]
        if top_k == 0:
            e_FW = keys.log_exponentials(number, self.width, start=self.vocab.start, stream=stream)
            return self.likeliest(z_FW / temperature - e_FW)[0]
        z_FK, token_FK = self.candidates(z_FW, top_k)
        e_FK = keys.log_exponentials(number, z_FK.shape[1], stream=stream)
        return token_FK.gather(1, (z_FK / temperature - e_FK).argmax(dim=1, keepdim=True))[:, 0]

    def candidates(self, z_FW: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits in descending order and their tokens, [F, k] each. Gathers each rank's k largest."""
        z_FK, column_FK = z_FW.topk(min(k, self.width), dim=-1)
        both = torch.stack([z_FK.double(), (column_FK + self.vocab.start).double()], dim=-1)
        of_R = self.vocab.gather(both.flatten(1)).unflatten(-1, (-1, 2))
        z_FN, token_FN = of_R.transpose(0, 1).flatten(1, 2).unbind(-1)
        z_FK, index_FK = z_FN.topk(min(k, z_FN.shape[1]), dim=-1)
        return z_FK, token_FN.gather(1, index_FK).long()
