"""The chunked LM head equals the loss over all logits: values, gradients, and what it keeps in memory.

Shapes: T positions, H hidden size, V columns.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.chunked_head import ChunkPlan, LMHead, chunked_loss
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED, TokenLoss
from megatron_sfr.objectives.token.token_loss import token_values, vocab_parallel_loss
from tests.objectives.token.token_cases import ALL_LOSSES, labels
from tools.traffic import Traffic

T, H, V, SIZE = 23, 6, 16, 13  # three columns are padding
SUPERVISED = {"all": T, "an odd number": 13, "none": 0}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and weight of the head."""
    g = torch.Generator().manual_seed(3)
    h_TH, weight_VH = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    return h_TH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_()


def make_head(weight_VH: Tensor, multiplier: float = 1.0, accumulator_VH: Tensor | None = None) -> LMHead:
    def project(h_CH: Tensor) -> Tensor:
        with torch.no_grad():
            return h_CH @ weight_VH.t()

    return LMHead(project, weight_VH, Vocab(SIZE), lambda x: x * multiplier if multiplier != 1 else x, accumulator_VH)


def whole(y_T: Tensor, loss: TokenLoss, multiplier: float = 1.0, factor: float = 1.0) -> dict[str, Tensor]:
    """All logits at once."""
    h_TH, weight_VH = states()
    values = token_values(h_TH @ weight_VH.t() * multiplier, y_T, loss, Vocab(SIZE))
    (factor * values.loss.sum()).backward()
    found = {"total": values.loss.sum(), **values._asdict()}
    return {name: x.detach() for name, x in found.items()} | {"h": h_TH.grad, "weight": weight_VH.grad}


def chunked(
    y_T: Tensor,
    loss: TokenLoss,
    chunk: int,
    multiplier: float = 1.0,
    factor: float = 1.0,
    plan: ChunkPlan | None = None,
    accumulator_VH: Tensor | None = None,
) -> dict[str, Tensor]:
    h_TH, weight_VH = states()
    head, index_N = make_head(weight_VH, multiplier, accumulator_VH), (y_T >= 0).nonzero()[:, 0]
    plan = plan or ChunkPlan(chunk)
    total, values = chunked_loss(h_TH, index_N, y_T[index_N], loss, head, plan)
    (factor * total).backward()
    found = {name: torch.zeros(T).index_copy(0, index_N, x_N) for name, x_N in values._asdict().items()}
    return found | {"total": total.detach(), "h": h_TH.grad, "weight": weight_VH.grad}


def masked(name: str) -> Tensor:
    """Labels, of which that number is not ignored."""
    y_T, order_T = labels(T, SIZE), torch.randperm(T, generator=torch.Generator().manual_seed(4))
    y_T[order_T[SUPERVISED[name] :]] = IGNORED
    return y_T


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_chunks_change_no_number(name: str) -> None:
    """Chunks that divide the positions, that do not, of one position, and larger than all."""
    for mask in SUPERVISED:
        y_T = masked(mask)
        expected = whole(y_T, ALL_LOSSES[name])
        for chunk in (1, 4, 13, 100):
            actual = chunked(y_T, ALL_LOSSES[name], chunk)
            torch.testing.assert_close(actual, {key: expected[key] for key in actual}, **TOLERANCE)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_scaled_logits_and_a_scaled_loss(name: str) -> None:
    """MuP's multiplier; a loss divided by its tokens; and gradients computed for fp16's loss scale."""
    y_T, case = masked("an odd number"), {"multiplier": 0.3, "factor": 0.125}
    expected = whole(y_T, ALL_LOSSES[name], **case)
    for factor in (1.0, torch.tensor(1024.0)):
        actual = chunked(y_T, ALL_LOSSES[name], 4, **case, plan=ChunkPlan(4, factor=factor))
        torch.testing.assert_close(actual, {key: expected[key] for key in actual}, **TOLERANCE)


def test_microbatches_accumulate_in_megatrons_buffer() -> None:
    masks, total_VH = (masked("an odd number"), masked("all"), masked("none")), torch.zeros(V, H)
    for y_T in masks:
        actual = chunked(y_T, CrossEntropy(), 4, accumulator_VH=total_VH)
        assert actual["weight"] is not None  # Megatron's DDP waits for a gradient of every parameter
        assert not actual["weight"].any()
        torch.testing.assert_close(actual["h"], whole(y_T, CrossEntropy())["h"], **TOLERANCE)
    expected = sum(whole(y_T, CrossEntropy())["weight"] for y_T in masks)
    torch.testing.assert_close(total_VH, expected, **TOLERANCE)


def test_the_buffer_takes_no_other_gradient_than_was_accumulated() -> None:
    plan = ChunkPlan(4, factor=torch.tensor(8.0))
    with pytest.raises(RuntimeError, match="loss_chunk_tokens to 0"):
        chunked(masked("an odd number"), CrossEntropy(), 4, factor=4.0, plan=plan, accumulator_VH=torch.zeros(V, H))


def test_a_loss_of_weight_0_has_gradients_of_exactly_0() -> None:
    """Phase A, in which only the flow head learns; the gradient at h can be measured all the same."""
    seen, total_VH = [], torch.zeros(V, H)
    for gradient in (True, False):
        plan = ChunkPlan(5, gradient=gradient, counts=False, on_gradient=seen.append)
        actual = chunked(masked("all"), CrossEntropy(), 5, factor=0.0, plan=plan, accumulator_VH=total_VH)
        assert not actual["h"].any()
        assert not actual["weight"].any()
    assert not total_VH.any()
    torch.testing.assert_close(torch.cat(seen), whole(masked("all"), CrossEntropy())["h"], **TOLERANCE)
    with pytest.raises(RuntimeError, match="weight 0"):
        chunked(masked("all"), CrossEntropy(), 5, plan=replace(plan, on_gradient=None))


def test_a_frozen_weight_and_an_evaluation() -> None:
    h_TH, weight_VH = states()
    y_T, weight_VH = masked("all"), weight_VH.detach()
    total, *_ = chunked_loss(h_TH, torch.arange(T), y_T, CrossEntropy(), make_head(weight_VH), ChunkPlan(5))
    total.backward()
    expected = whole(y_T, CrossEntropy())
    torch.testing.assert_close(h_TH.grad, expected["h"], **TOLERANCE)
    with torch.no_grad():
        plan = ChunkPlan(5, gradient=False)
        total, *_ = chunked_loss(h_TH, torch.arange(T), y_T, CrossEntropy(), make_head(weight_VH), plan)
    torch.testing.assert_close(total, expected["total"], **TOLERANCE)


def test_the_logits_are_shown_before_they_are_overwritten() -> None:
    h_TH, weight_VH = states()
    seen: list[Tensor] = []
    plan = ChunkPlan(6, on_logits=lambda z_CV: seen.append(z_CV.clone()))
    chunked_loss(h_TH, torch.arange(0, T, 2), masked("all")[::2], CrossEntropy(), make_head(weight_VH), plan)
    assert [len(z) for z in seen] == [6, 6]
    torch.testing.assert_close(torch.cat(seen), (h_TH @ weight_VH.t())[::2].detach(), **TOLERANCE)


def test_the_head_is_called_even_if_nothing_is_supervised() -> None:
    """Otherwise Megatron's hook on it would not wait for its weight."""
    h_TH, weight_VH = states()
    calls: list[int] = []
    head = make_head(weight_VH)
    counted = replace(head, project=lambda h_CH: (calls.append(len(h_CH)), head.project(h_CH))[1])
    none = torch.zeros(0, dtype=torch.int64)
    total, *_ = chunked_loss(h_TH, none, none, CrossEntropy(), counted, ChunkPlan(4))
    assert (calls, total.item()) == ([0], 0)


def test_values_are_equal_for_all_chunk_sizes_bit_for_bit() -> None:
    """Gradients are not: the weight's is a sum over chunks."""
    found = []
    for chunk in (5, 8, 23):
        h_TH, weight_VH = states(torch.float64)
        args = h_TH, torch.arange(T), masked("all"), CrossEntropy(), make_head(weight_VH), ChunkPlan(chunk)
        found.append(chunked_loss(*args)[1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ce", "gem-logsigmoid", "sed", "tofu", "eaft", "dft"])
def test_at_most_two_chunks_of_logits_are_alive(name: str) -> None:
    """bf16, 256 supervised of 1024 positions, with an fp32 buffer for the weight's gradient, as Megatron has it."""
    tokens, hidden, columns, chunk = 1024, 16, 16384, 128
    g = torch.Generator().manual_seed(0)
    h_TH = torch.randn(tokens, hidden, generator=g).bfloat16().requires_grad_()
    weight_VH = torch.randn(columns, hidden, generator=g).bfloat16().requires_grad_()
    y_T, index_N = torch.arange(tokens), torch.arange(0, tokens, 4)
    accumulator_VH = torch.zeros(columns, hidden)
    head = replace(make_head(weight_VH, accumulator_VH=accumulator_VH), vocab=Vocab(columns))
    chunk_bytes, like = chunk * columns * 2, torch.empty(chunk, columns, dtype=torch.bfloat16)
    with Traffic(like) as traffic:
        total, *_ = chunked_loss(h_TH, index_N, y_T[index_N], ALL_LOSSES[name], head, ChunkPlan(chunk))
        forward = traffic.peak
        total.backward()
    assert chunk_bytes < forward <= 2 * chunk_bytes
    assert traffic.peak <= 2 * chunk_bytes
    with Traffic(like) as traffic:
        loss_T, _ = vocab_parallel_loss(h_TH @ weight_VH.t(), y_T, ALL_LOSSES[name], Vocab(columns), overwrite=True)
        loss_T.sum().backward()
    assert traffic.peak > 8 * chunk_bytes
