"""Properties of every token objective: it equals its paper's loss in any dtype, with masking and padding.

Shapes: T tokens, V columns. Properties of GEM, SED and DFT, and sharding, are tested in separate files.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.token_loss import IGNORED, certainty, logit_gradient, token_loss
from tests.objectives.token.token_cases import OBJECTIVES, differentiated, labels, logits, written

EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def test_cross_entropy_is_torchs() -> None:
    z_TV, y_T = logits(40, 17), labels(40, 17, ignored=0.3)
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, OBJECTIVES["ce"])
    z_TV.requires_grad_()
    torchs_T = torch.nn.functional.cross_entropy(z_TV, y_T, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss_T, torchs_T, **EXACT)
    torch.testing.assert_close(cross_entropy_T, torchs_T, **EXACT)
    torch.testing.assert_close(g_TV, torch.autograd.grad(torchs_T.sum(), z_TV)[0], **EXACT)


def test_cross_entropy_is_megatrons(one_rank: None) -> None:
    """In fp32, on logits [s, b, v] as a model has them, with a weight for each token."""
    z_SBV, y_SB = logits(60, 503).float().view(20, 3, 503), labels(60, 503).view(20, 3)
    weight_SB = torch.rand(20, 3, generator=torch.Generator().manual_seed(2))
    theirs_SBV = z_SBV.clone().requires_grad_()
    theirs_SB = vocab_parallel_cross_entropy(theirs_SBV.clone(), y_SB)  # it overwrites its input
    (theirs_SB * weight_SB).sum().backward()
    vocab = Vocab(503, 0, parallel_state.get_tensor_model_parallel_group())
    loss_T, _, g_TV = differentiated(z_SBV.flatten(0, 1), y_SB.flatten(), OBJECTIVES["ce"], vocab, weight_SB.flatten())
    torch.testing.assert_close(loss_T, theirs_SB.detach().flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g_TV, theirs_SBV.grad.flatten(0, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["ce", "sed"])
def test_gradcheck_of_losses_without_stop_gradients(name: str) -> None:
    y_T = labels(5, 6, ignored=0.2)
    z_TV = logits(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_loss(z, y_T, OBJECTIVES[name], Vocab(6))[0], (z_TV,))


@every_objective
def test_the_returned_cross_entropy_is_plain_and_has_no_gradient(name: str) -> None:
    z_TV, y_T = logits(20, 9), labels(20, 9)
    _, cross_entropy_T, _ = differentiated(z_TV, y_T, OBJECTIVES[name])
    plain_T, _ = written(z_TV, y_T, OBJECTIVES["ce"])
    torch.testing.assert_close(cross_entropy_T, plain_T, **EXACT)
    assert not cross_entropy_T.requires_grad


@every_objective
def test_overwriting_gives_the_same_gradient_in_the_storage_of_the_logits(name: str) -> None:
    z_TV, y_T = logits(30, 11).float(), labels(30, 9, ignored=0.2)
    loss_T, _, g_TV = differentiated(z_TV, y_T, OBJECTIVES[name], Vocab(9))
    hidden_TV = z_TV.clone().requires_grad_()
    given_TV = hidden_TV * 1  # logits are never a leaf
    over_T, _ = token_loss(given_TV, y_T, OBJECTIVES[name], Vocab(9), overwrite=True)
    over_T.sum().backward(retain_graph=True)
    assert torch.equal(over_T, loss_T)
    assert torch.equal(hidden_TV.grad, g_TV)
    assert torch.equal(given_TV, g_TV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        over_T.sum().backward()


@every_objective
def test_without_overwriting_the_logits_are_unchanged(name: str) -> None:
    z_TV, y_T = logits(8, 5).requires_grad_(), labels(8, 5)
    before_TV = z_TV.detach().clone()
    loss_T, _ = token_loss(z_TV, y_T, OBJECTIVES[name], Vocab(5))
    first, second = (torch.autograd.grad(loss_T.sum(), z_TV, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(z_TV, before_TV)


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_g7_ignored_labels_have_loss_and_gradient_0(name: str, dtype: torch.dtype) -> None:
    """Exactly 0, also at large logits and for any weights of the losses; the other rows do not change."""
    z_TV, y_T = logits(30, 12, scale=1e4).to(dtype), labels(30, 12)
    ignored_T = torch.arange(30) % 3 == 0
    y_T[ignored_T] = torch.tensor([IGNORED, -1]).repeat(5)
    weight_T = torch.linspace(-1e6, 1e6, 30)
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, OBJECTIVES[name], weight_T=weight_T)
    for x in (loss_T, cross_entropy_T, g_TV):
        assert (x[ignored_T] == 0).all()
    alone = differentiated(z_TV[~ignored_T], y_T[~ignored_T], OBJECTIVES[name], weight_T=weight_T[~ignored_T])
    for x, there in zip((loss_T, cross_entropy_T, g_TV), alone, strict=True):
        assert torch.equal(x[~ignored_T], there)


@every_objective
@pytest.mark.parametrize("filling", [0.0, 1e9, float("nan"), float("inf"), -float("inf")])
def test_g9_padded_columns_are_never_read_and_get_exactly_0(name: str, filling: float) -> None:
    z_TV, y_T = logits(20, 13), labels(20, 10, ignored=0.2)
    z_TV[:, 10:] = filling
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, OBJECTIVES[name], Vocab(10))
    narrow = differentiated(z_TV[:, :10], y_T, OBJECTIVES[name])
    for x, there in zip((loss_T, cross_entropy_T, g_TV[:, :10]), narrow, strict=True):
        torch.testing.assert_close(x, there, **EXACT)
    assert (g_TV[:, 10:] == 0).all()


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_g10_logits_of_10_000_stay_finite(name: str, dtype: torch.dtype) -> None:
    z_TV = logits(64, 10).sign() * 1e4
    z_TV[0], z_TV[1] = 1e4, -1e4
    z_TV[2:32] += logits(30, 10, seed=1)
    for x in differentiated(z_TV.to(dtype), labels(64, 10), OBJECTIVES[name]):
        assert x.isfinite().all()


@every_objective
def test_g10_bf16_logits_are_summed_in_fp32_and_the_gradient_is_rounded_once(name: str) -> None:
    z_TV, y_T = logits(200, 301).bfloat16(), labels(200, 301, ignored=0.1)
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, OBJECTIVES[name])
    exact_T, exact_cross_entropy_T, _ = differentiated(z_TV.double(), y_T, OBJECTIVES[name])
    assert loss_T.dtype == cross_entropy_T.dtype == torch.float32
    for x, there in ((loss_T, exact_T), (cross_entropy_T, exact_cross_entropy_T)):
        assert (x - there).abs().max() <= 1e-5 * there.abs().max()
    single_T, _, single_TV = differentiated(z_TV.float(), y_T, OBJECTIVES[name])
    assert torch.equal(loss_T, single_T)
    assert g_TV.dtype == torch.bfloat16
    assert torch.equal(g_TV, single_TV.bfloat16())


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_measured_gradient_is_autograds(name: str, dtype: torch.dtype) -> None:
    z_TV, y_T = logits(40, 14).to(dtype), labels(40, 11, ignored=0.2)
    _, _, g_TV = differentiated(z_TV, y_T, OBJECTIVES[name], Vocab(11))
    before_TV = z_TV.clone()
    assert torch.equal(logit_gradient(z_TV, y_T, OBJECTIVES[name], Vocab(11)), g_TV)
    assert torch.equal(z_TV, before_TV)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Tensor, Tensor, int]:
    """An objective, logits in some dtype, labels (some, all or none ignored), real columns."""
    tokens, size, padding = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(0, 5))
    seed = draw(st.integers(0, 10_000))
    scale, grid = draw(st.sampled_from([0.1, 2.0, 20.0])), draw(st.booleans())
    z_TV = logits(tokens, size + padding, seed=seed, scale=scale, grid=grid)
    y = draw(st.lists(st.integers(-2, size - 1), min_size=tokens, max_size=tokens))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    y_T = torch.tensor([IGNORED if x == -2 else x for x in y], dtype=torch.int64)
    return draw(st.sampled_from(list(OBJECTIVES))), z_TV.to(dtype), y_T, size


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}  # half an ulp of bf16


@given(cases())
def test_every_objective_equals_its_reference_loss(case: tuple[str, Tensor, Tensor, int]) -> None:
    """Value and gradient against float64 autograd of the reference loss on the same logits."""
    name, z_TV, y_T, size = case
    objective, kept_T, dtype = OBJECTIVES[name], y_T >= 0, z_TV.dtype
    loss_T, _, g_TV = differentiated(z_TV, y_T, objective, Vocab(size))
    exact_T, exact_TV = written(z_TV[kept_T, :size].double(), y_T[kept_T], objective)
    largest = z_TV.abs().max().clamp(min=1).item() if len(z_TV) else 1  # a difference of logits has their rounding
    rounding = min(TOLERANCE[dtype], 1e-5)
    torch.testing.assert_close(loss_T[kept_T].double(), exact_T, rtol=rounding, atol=rounding * largest)
    atol = rounding * largest
    torch.testing.assert_close(g_TV[kept_T, :size].double(), exact_TV, rtol=TOLERANCE[dtype], atol=atol)
    assert (loss_T[~kept_T] == 0).all()
    assert (g_TV[~kept_T] == 0).all()
    assert (g_TV[:, size:] == 0).all()


@pytest.mark.parametrize("size", [1, 7, 9])
def test_certainty_is_that_of_the_softmax_over_the_real_columns(size: int) -> None:
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    entropy, top = certainty(z, Vocab(size))
    p = z[:, :size].softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(top, p.amax(-1))
