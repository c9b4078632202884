"""Context parallelism: this rank's positions of a microbatch, in upstream's zigzag order.

Of 2 R equal parts of a text, rank r of R has parts r and 2 R - 1 - r, which balances the work of causal attention. The
text is a sequence or, in packed sequences, each conversation.
Shapes: B samples, S positions of the sequence, A anchors.
"""

import torch
from torch import Tensor

from megatron_sfr.objectives.anchored.reference import LOG_P, TOKEN
from megatron_sfr.runtime.parallel import sequence_positions
from megatron_sfr.training.data.multi_token_labels import LABELS, MASK

OF_POSITIONS = ("tokens", "labels", "loss_mask", "position_ids", "group", LABELS, MASK, TOKEN, LOG_P)
"""What a batch has for each position, [B, S, ...]: `group` where metrics by persona are measured, the next two for
multi-token prediction, the last two for the reference of ASFT."""


def on_this_rank(batch: dict[str, Tensor], bounds: Tensor | None = None) -> dict[str, Tensor]:
    """The batch with this rank's positions, and with the anchors at them: the weight of all others is 0.

    bounds: of the texts that the ranks divide, as for `zigzag`; None: each sequence is one text.
    """
    length = batch["tokens"].shape[1]
    position, _ = sequence_positions(torch.tensor([0, length]) if bounds is None else bounds)
    position = position.to(batch["tokens"].device)
    divided = batch | {name: batch[name][:, position] for name in OF_POSITIONS if name in batch}
    if "anchor_position" in batch:
        local_S = torch.full((length,), -1, device=position.device)
        local_S[position] = torch.arange(len(position), device=position.device)
        local_BA = local_S[batch["anchor_position"]]
        divided["anchor_position"] = local_BA.clamp(min=0)
        divided["anchor_weight"] = batch["anchor_weight"] * (local_BA >= 0)
    return divided
