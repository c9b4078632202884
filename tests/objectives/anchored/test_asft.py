"""ASFT (arXiv 2509.23753): DFT plus the KL divergence from a reference of which k tokens are stored.

Sharding over real ranks is tested in tests/objectives/token/test_shards.py, training in tests/distributed/test_asft.py.
Shapes: T tokens, V columns, K tokens of the reference, S positions, B samples.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sfr.kernels.columns import Columns
from megatron_sfr.kernels.vocab_parallel import StatisticsSpec, Vocab
from megatron_sfr.objectives.anchored.asft import ASFT, AnchoredDFT
from megatron_sfr.objectives.anchored.reference import LOG_P, TOKEN, Reference, merged_kl, merged_log_softmax
from megatron_sfr.objectives.token.chunked_head import ChunkPlan, chunked_loss
from megatron_sfr.objectives.token.dft import DFT
from megatron_sfr.objectives.token.token_loss import logit_gradient, token_loss
from tests.objectives.token.test_chunked_head import TOLERANCE, T, make_head, masked, states, whole
from tests.objectives.token.token_cases import by_definition, differentiated, labels, logits, reference

EXACT = {"rtol": 1e-11, "atol": 1e-12}
SIZE = 13
Z_TV, Y_T = logits(50, SIZE, seed=7), labels(50, SIZE, seed=7)


def rows(reference: Reference, index: Tensor | slice) -> Reference:
    return Reference(*(x[index] for x in reference))


@pytest.mark.parametrize("k", [1, 4, SIZE - 1, SIZE])
def test_value_and_gradient_match_the_definition(k: int) -> None:
    """Labels are among the reference's tokens and are not; every fifth token is ignored."""
    loss, y_T = ASFT(weight=0.3).at(reference(50, SIZE, k)), Y_T.clone()
    y_T[::5] = -100
    loss_T, _, g_TV = differentiated(Z_TV, y_T, loss)
    known = y_T >= 0
    part = ASFT(weight=0.3).at(rows(loss.reference, known))
    for x, there in zip((loss_T[known], g_TV[known]), by_definition(Z_TV[known], y_T[known], part), strict=True):
        torch.testing.assert_close(x, there, **EXACT)
    assert not loss_T[~known].any()
    assert not g_TV[~known].any()


def test_with_all_tokens_it_is_the_papers_loss() -> None:
    """Equation 6, with the KL as the authors' code computes it: kl_div(log_softmax(model), softmax(reference))."""
    r = reference(50, SIZE, SIZE)
    log_r_TV = torch.empty_like(Z_TV).scatter(1, r.token, r.log_p[:, :-1])
    z_TV = Z_TV.clone().requires_grad_()
    kl_T = F.kl_div(z_TV.log_softmax(-1), log_r_TV.exp(), reduction="none").sum(-1)
    (DFT().loss(z_TV, Y_T) + 0.05 * kl_T).sum().backward()
    loss_T, _, g_TV = differentiated(Z_TV, Y_T, ASFT().at(r))
    torch.testing.assert_close(loss_T, (DFT().loss(Z_TV, Y_T) + 0.05 * kl_T).detach(), **EXACT)
    torch.testing.assert_close(g_TV, z_TV.grad, **EXACT)


def test_fewer_tokens_give_a_lower_bound_that_more_tokens_raise() -> None:
    kl_KT = torch.stack(
        [
            merged_kl(r.log_p, merged_log_softmax(Z_TV, r.token))
            for r in (reference(50, SIZE, k) for k in range(1, SIZE + 1))
        ]
    )
    assert (kl_KT[0] >= 0).all()
    assert (kl_KT.diff(dim=0) >= -1e-12).all()
    assert (kl_KT[-1] > kl_KT[0] + 0.1).any()


def test_a_model_that_is_its_reference_has_dfts_gradient() -> None:
    log_p_TV = Z_TV.log_softmax(-1)
    top = log_p_TV.topk(4)
    rest_T1 = log_p_TV.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    itself = Reference(top.indices, torch.cat([top.values, rest_T1], dim=-1))
    actual, expected = (differentiated(Z_TV, Y_T, loss) for loss in (ASFT(weight=2.0).at(itself), DFT()))
    torch.testing.assert_close(actual, expected, **EXACT)
    named = ASFT(weight=2.0).logged(*actual[:2])
    torch.testing.assert_close(named, {"asft kl": torch.zeros_like(actual[0])}, **EXACT)


@pytest.mark.parametrize("gap", [10.0, 30.0, 200.0])
def test_a_model_that_has_forgotten_the_rest_is_exact_in_fp32(gap: float) -> None:
    """1 - sum of the k probabilities would be 0 or rounding; the anchor matters most there. Beyond e^-60 the gradient
    of the rest is bounded and stays finite."""
    r = reference(50, SIZE, 3)
    z_TV = Z_TV.scatter_add(1, r.token, torch.full((50, 3), gap, dtype=torch.float64))
    expected = by_definition(z_TV.float().double(), Y_T, ASFT(weight=0.3).at(r))
    loss = ASFT(weight=0.3).at(Reference(r.token, r.log_p.float()))
    loss_T, _, g_TV = differentiated(z_TV.float(), Y_T, loss)
    torch.testing.assert_close(loss_T.double(), expected[0], rtol=1e-5, atol=1e-6)
    assert g_TV.isfinite().all()
    if gap < 60:
        torch.testing.assert_close(g_TV.double(), expected[1], rtol=1e-5, atol=1e-6)


def test_in_bf16_the_gradient_is_rounded_once() -> None:
    """Also at the reference's tokens, where it is a difference of nearly equal numbers."""
    r = reference(50, SIZE, 4)
    z_TV = Z_TV.bfloat16()
    loss = ASFT(weight=0.3).at(Reference(r.token, r.log_p.float()))
    _, exact_TV = by_definition(z_TV.double(), Y_T, ASFT(weight=0.3).at(r))
    g_TV = logit_gradient(z_TV, Y_T, loss, Vocab(SIZE))
    torch.testing.assert_close(g_TV.double(), exact_TV, rtol=2**-8, atol=1e-6)


def test_the_logits_are_as_before_after_the_forward_pass() -> None:
    z_TV, kept_TV = Z_TV.clone().requires_grad_(), Z_TV.clone()
    token_loss(z_TV, Y_T, ASFT().at(reference(50, SIZE, 4)))
    assert torch.equal(z_TV, kept_TV)


def test_columns_of_other_shards_are_neither_read_nor_written() -> None:
    z_TV, token_TC = torch.arange(12.0).view(2, 6), torch.tensor([[6, 9, 2], [11, 0, 13]])
    columns = Columns(token_TC, Vocab(20, start=6), 6)
    read_TC = columns.read(z_TV, torch.float32)
    assert torch.equal(read_TC, torch.tensor([[0, 3, -1e30], [11, -1e30, -1e30]]))
    columns.write(z_TV, torch.tensor([[100.0, 101, 102], [103, 104, 105]]))
    assert z_TV.tolist() == [[100, 1, 2, 101, 4, 5], [6, 7, 8, 9, 10, 103]]


def test_an_error_while_columns_are_left_out_leaves_the_logits_as_they_were() -> None:
    z_TV = torch.arange(12.0).view(2, 6)
    with pytest.raises(RuntimeError), Columns(torch.tensor([[1], [4]]), Vocab(6), 6).left_out(z_TV):
        raise RuntimeError
    assert torch.equal(z_TV, torch.arange(12.0).view(2, 6))


class WithTop(AnchoredDFT):
    """Asks for a statistic that leaves out the chosen columns."""

    @property
    def statistics(self) -> StatisticsSpec:
        return StatisticsSpec(top_k=2)


def test_statistics_without_the_chosen_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="WithTop has chosen columns: its statistics must be StatisticsSpec"):
        token_loss(Z_TV, Y_T, WithTop(0.3, reference(50, SIZE, 4)))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("supervised", ["all", "an odd number", "none"])
def test_chunks_change_no_number(supervised: str, chunk: int) -> None:
    y_T, r = masked(supervised), reference(T, SIZE, 4)
    r = Reference(r.token, r.log_p.float())
    expected = whole(y_T, ASFT(weight=0.3).at(r))
    h_TH, weight_VH = states()
    index_N = (y_T >= 0).nonzero()[:, 0]
    loss = ASFT(weight=0.3).at(rows(r, index_N))
    total, values = chunked_loss(h_TH, index_N, y_T[index_N], loss, make_head(weight_VH), ChunkPlan(chunk))
    total.backward()
    actual = {name: torch.zeros(T).index_copy(0, index_N, x_N) for name, x_N in values._asdict().items()}
    actual |= {"total": total.detach(), "h": h_TH.grad, "weight": weight_VH.grad}
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_a_batch_gives_each_position_its_reference() -> None:
    """Positions are counted over [S, B], batches are [B, S, ...]."""
    r = reference(6, SIZE, 2)
    batch = {TOKEN: r.token.int().view(2, 3, 2), LOG_P: r.log_p.view(2, 3, 3)}
    all_T, some_N = ASFT().of_batch(batch, None), ASFT().of_batch(batch, torch.tensor([1, 4]))
    assert torch.equal(all_T.reference.token, r.token[[0, 3, 1, 4, 2, 5]])
    assert torch.equal(some_N.reference.log_p, r.log_p[[3, 2]])
    with pytest.raises(ValueError, match="objective asft reads reference_token"):
        ASFT().of_batch({"tokens": r.token}, None)


def test_without_a_reference_it_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the reference model's probabilities"):
        token_loss(Z_TV, Y_T, ASFT())
    with pytest.raises(ValueError, match="choose at least 0"):
        ASFT(weight=-0.1)
