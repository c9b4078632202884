"""Attention that begins anew with each document of a row: as a mask for upstream's local attention, as bounds for TE's.

Letters: B rows, S positions.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def block_mask(document_BS: Tensor) -> Tensor:
    """Which positions may not be seen, bool [B, 1, S, S]: later ones, and those of another document.

    document counts the documents of a row in the order that they stand there.
    """
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    later_SS = place_S[None, :] > place_S[:, None]
    return (later_SS | (document_BS[:, :, None] != document_BS[:, None, :]))[:, None]


def packed_sequence(document_S: Tensor) -> PackedSeqParams:
    """The bounds of one row's documents, as Transformer Engine's attention and rotary embedding take them (THD).

    Read document where it is in host memory: the bounds are counted there, without a wait for the device.
    """
    lengths = torch.unique_consecutive(document_S, return_counts=True)[1]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
