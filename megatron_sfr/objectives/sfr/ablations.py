"""Deterministic ablations of SFR (arXiv 2605.27971): cosine regression, and alignment of representations by CKA.

Shapes: B samples, A anchors, D embedding dimension, H hidden size.
"""

import torch
from torch import Tensor

FEWEST = 4  # the unbiased HSIC divides by n - 3


def cosine_error(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x, y) along the last axis, in [0, 2], of a prediction x and a target y, with |x| replaced by max(|x|, 1).

    1 - x.y / (max(|x|, 1) |y|): the gradient of the plain cosine grows as 1 / |x|, and a new head predicts x = 0.
    """
    length = torch.linalg.vector_norm(x, dim=-1).clamp(min=1) * torch.linalg.vector_norm(y, dim=-1).clamp(min=1e-8)
    return 1 - (x * y).sum(-1) / length


def linear_cka_error(h_BAH: Tensor, x_BAD: Tensor, weight_BA: Tensor) -> tuple[Tensor, Tensor]:
    """1 - CKA(h, x) over the anchors of each sample, and the sample's weight: [B, 1, 1] each.

    Linear CKA with the unbiased HSIC (Kornblith et al., arXiv 1905.00414; Song et al., JMLR 2012). A sample with fewer
    than 4 anchors of positive weight has weight 0. The authors pool each sequence and compute CKA over a microbatch,
    which depends on how the batch is split; CKA over the anchors of one sample does not.
    """
    valid_BA = (weight_BA > 0).double()  # float64: the terms of the unbiased HSIC cancel
    n_B = valid_BA.sum(-1)
    enough_B = n_B >= FEWEST
    n_B = torch.where(enough_B, n_B, FEWEST)
    k_BAA, l_BAA = (_gram(x.double(), valid_BA) for x in (h_BAH, x_BAD))
    across, own_h, own_x = (_unbiased_hsic(a, b, n_B) for a, b in ((k_BAA, l_BAA), (k_BAA, k_BAA), (l_BAA, l_BAA)))
    cka_B = across / (own_h * own_x).clamp(min=1e-20).sqrt()
    weight_B = torch.where(enough_B, weight_BA.sum(-1), 0)
    return torch.where(enough_B, 1 - cka_B, 0).to(x_BAD.dtype)[:, None, None], weight_B[:, None, None]


def _gram(x_BAH: Tensor, valid_BA: Tensor) -> Tensor:
    """Gram matrix of the valid rows, with diagonal 0. x is normalized first: CKA does not depend on its scale."""
    x = x_BAH * valid_BA[..., None]
    x = x / x.square().sum((1, 2), keepdim=True).clamp(min=1e-20).sqrt()
    k_BAA = x @ x.transpose(1, 2)
    return k_BAA * (1 - torch.eye(k_BAA.shape[-1], dtype=k_BAA.dtype, device=k_BAA.device))


def _unbiased_hsic(k_BAA: Tensor, l_BAA: Tensor, n_B: Tensor) -> Tensor:
    """[tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3)) for Gram matrices with zero diagonal: [B]."""
    k_BA, l_BA = k_BAA.sum(-1), l_BAA.sum(-1)
    trace, both = (k_BAA * l_BAA).sum((1, 2)), (k_BA * l_BA).sum(-1)
    ends = k_BA.sum(-1) * l_BA.sum(-1)
    return (trace + ends / ((n_B - 1) * (n_B - 2)) - 2 * both / (n_B - 2)) / (n_B * (n_B - 3))
