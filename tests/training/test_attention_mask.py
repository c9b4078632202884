"""Mask and cu_seqlens that keep attention within documents, and the parts of documents that ranks share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.model.gathered_attention import gathered_mask
from megatron_sfr.runtime.cpu import _window_mask
from megatron_sfr.runtime.parallel import zigzag
from megatron_sfr.training.attention_mask import block_mask, document_attention, document_bounds, packed_sequence

CPU = torch.device("cpu")
some_texts = st.tuples(st.integers(2, 4), st.lists(st.integers(1, 5), min_size=1, max_size=6))


def bounds_of(ranks: int, parts: list[int]) -> torch.Tensor:
    """Bounds of texts with 2 R parts of these lengths."""
    return torch.tensor([0, *parts]).cumsum(0).to(torch.int32) * 2 * ranks


def test_a_position_attends_to_itself_and_earlier_ones_of_its_document() -> None:
    document = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    hidden = block_mask(document)

    assert hidden.shape == (2, 1, 6, 6)
    for row in range(2):
        for i in range(6):
            seen = [j for j in range(i + 1) if document[row, j] == document[row, i]]
            assert (~hidden[row, 0, i]).nonzero().flatten().tolist() == seen


def test_cu_seqlens_are_the_starts_of_documents() -> None:
    params = packed_sequence(document_bounds(torch.tensor([0, 0, 1, 2, 2, 2, 2])))

    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q.dtype == torch.int32
    assert params.cu_seqlens_q.tolist() == [0, 2, 3, 7]
    # Transformer Engine and upstream's multi-token prediction: padding belongs to the documents.
    assert params.cu_seqlens_q is params.cu_seqlens_kv is params.cu_seqlens_q_padded is params.cu_seqlens_kv_padded
    assert params.pad_between_seqs is False
    assert params.max_seqlen_q == params.max_seqlen_kv == 4
    assert document_bounds(torch.zeros(5)).tolist() == [0, 5]


def test_cu_seqlens_are_of_one_sequence() -> None:
    with pytest.raises(ValueError, match="come one at a time, not 2"):
        document_attention(torch.zeros(2, 4), CPU, thd=True)


def test_ranks_share_texts_as_in_the_documentation_of_transformer_engine() -> None:
    """The example of attn_forward_func_with_cp in Transformer Engine 2.20.2: texts of 8 and 4 tokens on two ranks."""
    bounds = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag(bounds, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag(bounds, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@given(some_texts)
def test_a_rank_has_two_parts_of_each_text(texts: tuple[int, list[int]]) -> None:
    ranks, parts = texts
    bounds = bounds_of(ranks, parts)
    for rank in range(ranks):
        expected = []
        for start, end in bounds.unfold(0, 2, 1):
            part = torch.arange(start, end).chunk(2 * ranks)
            expected += [part[rank], part[2 * ranks - 1 - rank]]
        found = zigzag(bounds, ranks, rank)
        assert found.dtype == torch.int64
        assert torch.equal(found, torch.cat(expected))


def test_one_rank_has_all_positions_also_of_texts_without_equal_parts() -> None:
    assert zigzag(torch.tensor([0, 3, 7]), 1, 0).tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"2 context-parallel ranks cannot share a text of 3 tokens: .* multiple of 4"):
        zigzag(torch.tensor([0, 4, 7, 12]), 2, 0)


@given(some_texts)
def test_divided_attention_is_that_of_the_undivided_sequence(texts: tuple[int, list[int]]) -> None:
    ranks, parts = texts
    bounds = bounds_of(ranks, parts)
    document = torch.arange(len(parts)).repeat_interleave(bounds.diff())
    expected = block_mask(document[None])
    every = torch.cat([zigzag(bounds, ranks, rank) for rank in range(ranks)])
    for rank in range(ranks):
        own = zigzag(bounds, ranks, rank)
        assert torch.equal(gathered_mask(own, every, bounds), expected[:, :, own][..., every])


def test_a_window_of_undivided_positions_is_upstreams() -> None:
    position, bounds = torch.arange(6), torch.tensor([0, 6])
    expected = _window_mask(6, 6, (2, 0))
    assert torch.equal(gathered_mask(position, position, bounds, (2, 0))[0, 0], expected)
    own = torch.tensor([0, 5])
    assert torch.equal(gathered_mask(own, position.flip(0), bounds, (2, 0))[0, 0], expected[own].flip(1))
