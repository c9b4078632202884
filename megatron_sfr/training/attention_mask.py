"""Attention within the documents of a packed sequence: a mask for local attention, cu_seqlens for Transformer Engine.

Shapes: B sequences, S positions.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_sfr.runtime.parallel import context_size, sequence_positions


def block_mask(document_BS: Tensor) -> Tensor:
    """The masked positions, bool [B, 1, S, S]: later ones, and those of another document.

    document_BS numbers the documents of a sequence in order.
    """
    position_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    later_SS = position_S[None, :] > position_S[:, None]
    return (later_SS | (document_BS[:, :, None] != document_BS[:, None, :]))[:, None]


def packed_sequence(document_S: Tensor) -> PackedSeqParams:
    """The cu_seqlens of one sequence's documents, for Transformer Engine's attention and rotary embedding (THD).

    Pass document_S in host memory, so that counting does not wait for the device.
    """
    lengths = torch.unique_consecutive(document_S, return_counts=True)[1]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def document_attention(document_BS: Tensor, implementation: str, device: torch.device) -> dict[str, Any]:
    """The arguments of the model that keep attention within documents, numbered by document_BS in host memory.

    Transformer Engine takes one sequence at a time: config/validation.py requires micro_batch_size 1.
    """
    if implementation == "local":
        mask = block_mask(document_BS.to(device, non_blocking=True))
        if context_size() > 1:  # of this rank's queries, and of all keys in the order in which they are gathered
            own, every = (x.to(device) for x in sequence_positions(document_BS.shape[1] // context_size()))
            mask = mask[:, :, own][..., every]
        return {"attention_mask": mask}
    params = packed_sequence(document_BS[0])
    params.cu_seqlens_q = params.cu_seqlens_kv = params.cu_seqlens_q.to(device, non_blocking=True)
    return {"attention_mask": None, "packed_seq_params": params}
