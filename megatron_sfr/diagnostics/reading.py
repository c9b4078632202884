"""What a model says at each position of real replies: the token's loss, entropy, the top token's mass, the tail's.

Letters: N positions, T positions of one sample, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sfr.data.prepared import PreparedData


@dataclass(frozen=True)
class Positions:
    """Input positions that predict a supervised token, of some samples of a prepared folder; arrays [N]."""

    sample: np.ndarray
    place: np.ndarray  # i: the hidden state there is the condition, token i + 1 is predicted
    token: np.ndarray  # token i + 1
    relative: np.ndarray  # where it stands among the sample's supervised tokens, in [0, 1)
    persona: np.ndarray  # names


@dataclass(frozen=True)
class Reading:
    """One model at these positions; fp32 arrays [N], in nats where they have a unit.

    nll: -ln p of the token that stands there; top: the largest probability; tail: the mass outside the fewest likeliest
    tokens that hold top_p.
    """

    nll: np.ndarray
    entropy: np.ndarray
    top: np.ndarray
    tail: np.ndarray


def positions(data: PreparedData, samples: Sequence[int]) -> Positions:
    """ValueError where the samples have no supervised token."""
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for index in samples:
        sample = data[index]
        place = np.flatnonzero(sample.loss_mask[1:])
        n = len(place)
        found = (np.full(n, index), place, sample.tokens[1:][place], np.arange(n) / max(n, 1), [sample.persona] * n)
        for column, values in zip(columns, found, strict=True):
            column.append(np.asarray(values))
    joined = [np.concatenate(column) if column else np.zeros(0) for column in columns]
    if not len(joined[0]):
        raise ValueError(f"the chosen samples of {data.folder} have no supervised token to look at")
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
    """The readings of a Hugging Face model and its hidden states [N, H] on the CPU, sample by sample.

    Args: layer: index into Hugging Face's `hidden_states`; -1 is after the final norm, which the head reads by default.
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
