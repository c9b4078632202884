"""KL-flow's exact denoiser of one independent token, which no trained denoiser can beat.

Shapes: B points, V tokens. x_t: a point of the simplex; t: time; pi: the tokens' probabilities; l_1^(i): logarithm of
token i's smoothed one-hot.
"""

import torch
from torch import Tensor

from megatron_sfr.kl_flow.simplex_path import Simplex


def bayes_logits(x_BV: Tensor, t_B: Tensor, prior_V: Tensor, simplex: Simplex) -> Tensor:
    """ln p(i | x_t) up to a constant [B, V], float64.

    x_0 has density (V - 1)! on the simplex. The path of token i, x_t ~ x_0^(1 - t) e^(t l_1^(i)), has the inverse
    Y_k^(i) = exp((ln x_k - t l_1k^(i)) / (1 - t)), which gives p(i | x_t) ~ pi_i (sum_k Y_k^(i))^(-V).
    """
    V = simplex.size
    l_1_VV = simplex.low + simplex.gap * torch.eye(V, dtype=torch.float64)
    t_B11 = t_B.double()[:, None, None]
    log_y_BVV = (x_BV.double().log()[:, None] - t_B11 * l_1_VV) / (1 - t_B11)
    return prior_V.double().log() - V * log_y_BVV.logsumexp(-1)
