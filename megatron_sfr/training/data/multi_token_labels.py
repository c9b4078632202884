"""What the layers of multi-token prediction (MTP) learn from a microbatch: labels of later positions.

Shapes: B samples, S positions, K MTP layers.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LABELS, MASK, SHARE = "mtp_labels", "mtp_mask", "mtp_share"


def multi_token_labels(batch: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The batch with labels and loss masks of the MTP layers, from complete sequences.

    Layer k, from 1, has at position i the label of position i + k, where that is supervised and of the same document
    (`document` [B, S] of the batch, if it has one). The sum of its losses is multiplied by the ratio of the supervised
    tokens to its own, as upstream does (megatron-core 0.19.2): the mean of its losses then counts as much as the mean
    of the main loss.

    Returns:
        The batch with mtp_labels int64 [B, S, K], mtp_mask fp32 [B, S, K]
        and the ratios mtp_share fp32 [K].
    """
    label_BS, mask_BS, document_BS = batch["labels"], batch["loss_mask"], batch.get("document")
    labels, masks = [], []
    for k in range(1, layers + 1):
        later_BS = _later(mask_BS, k)
        if document_BS is not None:
            later_BS = later_BS * (_later(document_BS, k) == document_BS)
        labels.append(_later(label_BS, k))
        masks.append(later_BS)
    mask_BSK = torch.stack(masks, dim=-1)
    share_K = mask_BS.sum().clamp(min=1) / mask_BSK.sum((0, 1)).clamp(min=1)
    return batch | {LABELS: torch.stack(labels, dim=-1), MASK: mask_BSK, SHARE: share_K}


def _later(x_BS: Tensor, k: int) -> Tensor:
    """The values k positions later; 0 at the end."""
    return pad(x_BS[:, k:], (0, min(k, x_BS.shape[1])))
