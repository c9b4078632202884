"""What a reference model predicts for each token, in short: its k most likely tokens, and all others as one.

KL(reference || model) over these k + 1 outcomes is at most the KL over the whole vocabulary, because merging outcomes
never increases a KL divergence. It is equal if the model divides the rest as the reference does, or if k is the
vocabulary.
Shapes: T tokens, V tokens of the whole vocabulary, K tokens of the reference.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TOKEN, LOG_P = "reference_token", "reference_log_p"
"""What a batch has for each position: int32 [B, S, K] and fp32 [B, S, K + 1], as in `Reference`."""


class Reference(NamedTuple):
    """A reference model's distribution of each token.

    Example:
        >>> import torch, megatron_sfr as sfr
        >>> log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()  # of token 7, token 2, and all others together
        >>> sfr.Reference(torch.tensor([[7, 2]]), log_p).token.shape
        torch.Size([1, 2])
    """

    token: Tensor
    """Token ids, int64 [..., K], different from each other."""
    log_p: Tensor
    """ln of their probabilities, and last that of all other tokens together: [..., K + 1]. -inf is probability 0."""


def merged_log_softmax(z_TV: Tensor, token_TK: Tensor) -> Tensor:
    """ln of the model's probability of some tokens, and of all others together: [T, K + 1]."""
    chosen_TK = z_TV.log_softmax(-1).gather(1, token_TK)
    if token_TK.shape[-1] == z_TV.shape[-1]:
        return torch.cat([chosen_TK, chosen_TK.new_full((len(z_TV), 1), -torch.inf)], dim=-1)
    rest_T = z_TV.scatter(1, token_TK, -torch.inf).logsumexp(-1) - z_TV.logsumexp(-1)
    return torch.cat([chosen_TK, rest_T[:, None]], dim=-1)


def merged_kl(reference_log_p_TN: Tensor, log_p_TN: Tensor) -> Tensor:
    """KL(reference || model) = sum_n r_n (ln r_n - ln p_n), 0 where r_n = 0: [T]."""
    r_TN = reference_log_p_TN.exp()
    return torch.where(r_TN > 0, r_TN * (reference_log_p_TN - log_p_TN), 0).sum(-1)
