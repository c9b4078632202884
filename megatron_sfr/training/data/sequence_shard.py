"""Context parallelism: this rank's positions of a microbatch, in upstream's zigzag order.

Of 2 R equal parts of a sequence, rank r of R has parts r and 2 R - 1 - r, which balances the work of causal attention.
Shapes: B samples, S positions of the sequence, A anchors.
"""

import torch
from torch import Tensor

from megatron_sfr.runtime.parallel import context_size, sequence_positions
from megatron_sfr.training.data.multi_token_labels import LABELS, MASK

OF_POSITIONS = ("tokens", "labels", "loss_mask", "position_ids", "group", LABELS, MASK)
"""What a batch has for each position, [B, S, ...]: `group` where metrics by persona are measured, the last two for
multi-token prediction."""


def on_this_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with this rank's positions, and with the anchors at them: the weight of all others is 0."""
    length = batch["tokens"].shape[1]
    position, _ = (x.to(batch["tokens"].device) for x in sequence_positions(length // context_size()))
    divided = batch | {name: batch[name][:, position] for name in OF_POSITIONS if name in batch}
    if "anchor_position" in batch:
        local_S = torch.full((length,), -1, device=position.device)
        local_S[position] = torch.arange(len(position), device=position.device)
        local_BA = local_S[batch["anchor_position"]]
        divided["anchor_position"] = local_BA.clamp(min=0)
        divided["anchor_weight"] = batch["anchor_weight"] * (local_BA >= 0)
    return divided
