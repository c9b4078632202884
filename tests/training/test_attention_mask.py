"""The mask and cu_seqlens that keep attention within documents, against their definitions."""

import torch

from megatron_sfr.training.attention_mask import block_mask, packed_sequence


def test_a_position_attends_to_itself_and_earlier_ones_of_its_document() -> None:
    document = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    hidden = block_mask(document)

    assert hidden.shape == (2, 1, 6, 6)
    for row in range(2):
        for i in range(6):
            seen = [j for j in range(i + 1) if document[row, j] == document[row, i]]
            assert (~hidden[row, 0, i]).nonzero().flatten().tolist() == seen


def test_cu_seqlens_are_the_starts_of_documents() -> None:
    params = packed_sequence(torch.tensor([0, 0, 1, 2, 2, 2, 2]))

    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q.dtype == params.cu_seqlens_kv.dtype == torch.int32
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 2, 3, 7]
    assert params.max_seqlen_q == params.max_seqlen_kv == 4
    assert packed_sequence(torch.zeros(5)).cu_seqlens_q.tolist() == [0, 5]
