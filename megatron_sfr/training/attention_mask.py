"""Attention within the documents of a packed sequence: by a mask, or by cu_seqlens (THD).

Transformer Engine's attention reads cu_seqlens, local attention a mask and, under context parallelism, also cu_seqlens.
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


def document_bounds(document_S: Tensor) -> Tensor:
    """Where the documents of one sequence start, and the end of the last one: int32 [n + 1].

    Pass document_S in host memory, so that counting does not wait for the device.
    """
    lengths = torch.unique_consecutive(document_S, return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def packed_sequence(bounds: Tensor, device: torch.device | str = "cpu") -> PackedSeqParams:
    """The cu_seqlens of documents with these bounds, for attention, rotary embedding and multi-token prediction (THD).

    What pads a document counts as its last tokens, also in cu_seqlens_q: attention is causal, so no other token attends
    to them. Upstream's multi-token prediction divides cu_seqlens_q by the number of context-parallel ranks
    (megatron-core 0.19.2). Transformer Engine 2.20.2 has fewer kernels for padding between documents, and earlier
    versions overlooked it at a sequence's end (NVIDIA/TransformerEngine#3331).
    """
    longest, bounds = int(bounds.diff().max()), bounds.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,  # required under context parallelism
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )


def document_attention(document_BS: Tensor, device: torch.device, *, thd: bool) -> tuple[dict[str, Any], Tensor]:
    """What keeps attention within documents.

    Args:
        document_BS: numbers the documents of a sequence in order, in host memory.
        thd: whether attention reads cu_seqlens instead of a mask.
    Returns:
        Arguments of the model, and the bounds of the texts that context-parallel ranks divide: those of the documents,
        or [0, S] with a mask.
    Raises:
        ValueError: cu_seqlens describe one sequence, and there are several.
    """
    if thd:
        if len(document_BS) > 1:
            raise ValueError(f"packed sequences without a mask come one at a time, not {len(document_BS)}")
        bounds = document_bounds(document_BS[0])
        return {"attention_mask": None, "packed_seq_params": packed_sequence(bounds, device)}, bounds
    mask, bounds = block_mask(document_BS.to(device, non_blocking=True)), torch.tensor([0, document_BS.shape[1]])
    if context_size() > 1:  # of this rank's queries, and of all keys in the order in which they are gathered
        own, every = (x.to(device) for x in sequence_positions(bounds))
        mask = mask[:, :, own][..., every]
    return {"attention_mask": mask}, bounds
