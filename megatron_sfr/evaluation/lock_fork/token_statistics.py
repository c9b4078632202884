"""A model's statistics at each position of real replies: loss of the token, entropy, top-1 and tail probability.

Shapes: N positions, T positions of one sample, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.data.prepared.conversations import PreparedData


@dataclass(frozen=True)
class Positions:
    """Input positions that predict a supervised token, in some samples of a prepared folder; arrays [N]."""

    sample: np.ndarray
    place: np.ndarray
    """Position i, whose hidden state predicts token i + 1."""
    token: np.ndarray
    """Token i + 1."""
    relative: np.ndarray
    """Its relative position among the sample's supervised tokens, in [0, 1)."""
    persona: np.ndarray
    """Names."""


@dataclass(frozen=True)
class Reading:
    """One model's statistics at these positions; fp32 arrays [N], nll and entropy in nats.

    nll: -ln p of the actual token; top: the largest probability; tail: the probability outside the top_p nucleus, the
    smallest set of most likely tokens whose probability reaches top_p.
    """

    nll: np.ndarray
    entropy: np.ndarray
    top: np.ndarray
    tail: np.ndarray


def positions(data: PreparedData, samples: Sequence[int]) -> Positions:
    """The positions of some samples. Raises ValueError if they have no supervised token."""
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for index in samples:
        sample = data[index]
        place = np.flatnonzero(sample.loss_mask[1:])
        n = len(place)
        fields = (np.full(n, index), place, sample.tokens[1:][place], np.arange(n) / max(n, 1), [sample.persona] * n)
        for column, values in zip(columns, fields, strict=True):
            column.append(np.asarray(values))
    joined = [np.concatenate(column) if column else np.zeros(0) for column in columns]
    if not len(joined[0]):
        raise ValueError(f"the chosen samples of {data.folder} have no supervised token; give more --samples")
    return Positions(*joined)


def token_statistics(logits_TV: Tensor, token_T: Tensor, top_p: float) -> Tensor:
    """nll, entropy, top and tail of each row, as in Reading: fp32 [4, T]."""
    log_p_TV = logits_TV.float().log_softmax(-1)
    p_TV = log_p_TV.exp()
    nll_T = -log_p_TV.gather(-1, token_T[:, None])[:, 0]
    entropy_T = -(p_TV * log_p_TV.nan_to_num(neginf=0)).sum(-1)
    sorted_TV = p_TV.sort(dim=-1, descending=True).values
    before_TV = sorted_TV.double().cumsum(-1) - sorted_TV
    held_T = (sorted_TV * (before_TV < top_p)).sum(-1)
    return torch.stack([nll_T, entropy_T, sorted_TV[:, 0], (1 - held_T).clamp(min=0)])


@torch.inference_mode()
def read(network: Any, data: PreparedData, where: Positions, top_p: float, layer: int = -1) -> tuple[Reading, Tensor]:
    """Statistics and hidden states [N, H] of a Hugging Face model, on the CPU. Runs one sample at a time.

    Args: layer: index into Hugging Face's `hidden_states`; -1 is after the final norm, the head's default.
    """
    statistics, hidden = [], []
    for index in dict.fromkeys(where.sample.tolist()):
        chosen = where.sample == index
        place_T = torch.from_numpy(where.place[chosen])
        tokens = torch.from_numpy(data[index].tokens[:-1]).long()[None].to(network.device)
        output = network(input_ids=tokens, use_cache=False, output_hidden_states=True)
        token_T = torch.from_numpy(where.token[chosen]).long()
        statistics.append(token_statistics(output.logits[0, place_T].cpu(), token_T, top_p))
        hidden.append(output.hidden_states[layer][0, place_T].float().cpu())
    return Reading(*torch.cat(statistics, dim=1).numpy()), torch.cat(hidden)
