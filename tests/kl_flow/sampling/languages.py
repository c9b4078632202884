"""Toy languages with an exact denoiser: the posterior of a token given all noisy points of its sequence.

Shapes: B rows, S positions, V tokens, W columns of a shard.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sfr.kl_flow.simplex_path import Simplex


def log_likelihood(x_BSV: Tensor, t_B: Tensor, simplex: Simplex) -> Tensor:
    """ln p(x_t | token i) up to a constant of the position: [B, S, V], float64.

    By change of variables from x0 ~ Dirichlet(1): Y_k = exp((ln x_k - t l1_k) / (1 - t)), p ~ (sum_k Y_k)^-V. A clean
    one-hot is a given token.
    """
    x_BSV, t = x_BSV.double(), t_B.double()[:, None, None]
    one_hot = torch.eye(simplex.size, dtype=torch.float64)
    l_BSIV = (x_BSV.log()[:, :, None] - (t * simplex.gap)[..., None] * one_hot) / (1 - t)[..., None]
    actual_BSV = -simplex.size * l_BSIV.logsumexp(dim=-1)
    given_BS1 = (x_BSV == 1).any(dim=-1, keepdim=True)
    return torch.where(given_BS1, x_BSV.log(), actual_BSV)


@dataclass(frozen=True)
class MarkovLanguage:
    """Sequences from a Markov chain; `denoise` is the exact posterior of each token given the whole sequence."""

    first_V: Tensor
    move_VV: Tensor
    """move[a, b]: probability of b after a."""
    simplex: Simplex

    def denoise(self, x_BSV: Tensor, t_B: Tensor) -> Tensor:
        """ln p(token | x_t), by the forward-backward algorithm: [B, S, V]."""
        seen_BSV = log_likelihood(x_BSV, t_B, self.simplex)
        seen_BSV = seen_BSV - seen_BSV.amax(dim=-1, keepdim=True)
        like_BSV, length = seen_BSV.exp(), x_BSV.shape[1]
        ahead, behind = [self.first_V * like_BSV[:, 0]], [torch.ones_like(like_BSV[:, 0])]
        for s in range(1, length):
            ahead.append(self._scaled(ahead[-1]) @ self.move_VV * like_BSV[:, s])
            behind.append((self._scaled(behind[-1]) * like_BSV[:, length - s]) @ self.move_VV.T)
        return torch.stack(ahead, dim=1).log() + torch.stack(behind[::-1], dim=1).log()

    @staticmethod
    def _scaled(p_BV: Tensor) -> Tensor:
        return p_BV / p_BV.sum(dim=-1, keepdim=True)

    def pairs(self, position: int) -> Tensor:
        """p(token at position, token at position + 1): [V, V]."""
        p_V = self.first_V
        for _ in range(position):
            p_V = p_V @ self.move_VV
        return p_V[:, None] * self.move_VV


def language(seed: int = 0, size: int = 6, sharpness: float = 1.5) -> MarkovLanguage:
    """A chain with strong dependencies between neighbours."""
    numbers = torch.Generator().manual_seed(seed)
    scores_VV = sharpness * torch.randn(size + 1, size, generator=numbers, dtype=torch.float64)
    p_VV = scores_VV.softmax(dim=-1)
    return MarkovLanguage(p_VV[0], p_VV[1:], Simplex(size))


def independent(prior: list[float]) -> MarkovLanguage:
    """Independent positions."""
    p_V = torch.tensor(prior, dtype=torch.float64)
    return MarkovLanguage(p_V, p_V.expand(len(p_V), -1), Simplex(len(p_V)))


def total_variation(actual: Tensor, expected: Tensor) -> float:
    """Total variation distance between relative frequencies and probabilities."""
    return float((actual.double() / actual.sum() - expected).abs().sum() / 2)
