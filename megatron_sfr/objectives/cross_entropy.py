"""Cross-entropy's gradient in the logits, in closed form, for measuring other objectives against it.

The loss itself is upstream's vocab-parallel cross-entropy. Letters: T tokens, V columns of the local shard.
"""

import torch
from torch import Tensor

from megatron_sfr.objectives.vocab import Vocab


@torch.no_grad()
def logit_gradient(z_TV: Tensor, y_T: Tensor, mask_T: Tensor, vocab: Vocab) -> Tensor:
    """Gradient of sum_t mask_t CE(z_t, y_t) in the logits: mask (softmax(z) - e_y), fp32 [T, V].

    A second pass through upstream's backward is no substitute: it overwrites the softmax that it saved.
    """
    g_TV = vocab.softmax(z_TV.float())
    g_TV -= vocab.one_hot(y_T, z_TV.shape[-1]).to(g_TV.dtype)
    return g_TV * mask_T[:, None]
