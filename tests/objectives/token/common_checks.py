"""What holds for every token loss: it equals its definition in any dtype, with ignored tokens and padding columns.

Each check takes a loss and fails with an AssertionError. G7, G9 and G10 are explained in docs/math.md.
Shapes: T tokens, V columns.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED, TokenLoss
from megatron_sfr.objectives.token.token_loss import logit_gradient, vocab_parallel_loss
from tests.objectives.token.token_cases import by_definition, differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}  # half an ulp of bf16
DTYPES = tuple(TOLERANCE)


def equals_its_definition(loss: TokenLoss) -> None:
    """Value and gradient against float64 autograd of `loss` on the same logits, for any labels, dtype and padding."""

    @given(st.data())
    def check(data: st.DataObject) -> None:
        tokens, size, padding = (data.draw(st.integers(*bounds)) for bounds in ((0, 9), (1, 40), (0, 5)))
        seed, grid = data.draw(st.integers(0, 10_000)), data.draw(st.booleans())
        scale, dtype = data.draw(st.sampled_from([0.1, 2.0, 20.0])), data.draw(st.sampled_from(DTYPES))
        z_TV = logits(tokens, size + padding, seed=seed, scale=scale, grid=grid).to(dtype)
        y = data.draw(st.lists(st.integers(-2, size - 1), min_size=tokens, max_size=tokens))
        y_T = torch.tensor([IGNORED if x == -2 else x for x in y], dtype=torch.int64)
        kept_T = y_T >= 0
        loss_T, _, g_TV = differentiated(z_TV, y_T, loss, Vocab(size))
        exact_T, exact_TV = by_definition(z_TV[kept_T, :size].double(), y_T[kept_T], loss)
        largest = z_TV.abs().max().clamp(min=1).item() if len(z_TV) else 1  # a difference of logits has their rounding
        rounding = min(TOLERANCE[dtype], 1e-5)
        torch.testing.assert_close(loss_T[kept_T].double(), exact_T, rtol=rounding, atol=rounding * largest)
        atol = rounding * largest
        torch.testing.assert_close(g_TV[kept_T, :size].double(), exact_TV, rtol=TOLERANCE[dtype], atol=atol)
        assert (loss_T[~kept_T] == 0).all()
        assert (g_TV[~kept_T] == 0).all()
        assert (g_TV[:, size:] == 0).all()

    check()


def reports_cross_entropy_without_a_gradient(loss: TokenLoss) -> None:
    z_TV, y_T = logits(20, 9), labels(20, 9)
    _, cross_entropy_T, _ = differentiated(z_TV, y_T, loss)
    torch.testing.assert_close(cross_entropy_T, by_definition(z_TV, y_T, CrossEntropy())[0], **EXACT)
    assert not cross_entropy_T.requires_grad


def overwriting_gives_the_same_gradient_in_the_storage_of_the_logits(loss: TokenLoss) -> None:
    z_TV, y_T = logits(30, 11).float(), labels(30, 9, ignored=0.2)
    loss_T, _, g_TV = differentiated(z_TV, y_T, loss, Vocab(9))
    hidden_TV = z_TV.clone().requires_grad_()
    given_TV = hidden_TV * 1  # logits are never a leaf
    over_T, _ = vocab_parallel_loss(given_TV, y_T, loss, Vocab(9), overwrite=True)
    over_T.sum().backward(retain_graph=True)
    assert torch.equal(over_T, loss_T)
    assert torch.equal(hidden_TV.grad, g_TV)
    assert torch.equal(given_TV, g_TV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        over_T.sum().backward()


def without_overwriting_the_logits_are_unchanged(loss: TokenLoss) -> None:
    z_TV, y_T = logits(8, 5).requires_grad_(), labels(8, 5)
    before_TV = z_TV.detach().clone()
    loss_T, _ = vocab_parallel_loss(z_TV, y_T, loss, Vocab(5))
    first, second = (torch.autograd.grad(loss_T.sum(), z_TV, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(z_TV, before_TV)


def g7_ignored_labels_have_loss_and_gradient_0(loss: TokenLoss) -> None:
    """Exactly 0, also at large logits and for any weights of the losses; the other tokens do not change."""
    for dtype in DTYPES:
        z_TV, y_T = logits(30, 12, scale=1e4).to(dtype), labels(30, 12)
        ignored_T = torch.arange(30) % 3 == 0
        y_T[ignored_T] = torch.tensor([IGNORED, -1]).repeat(5)
        weight_T = torch.linspace(-1e6, 1e6, 30)
        results = differentiated(z_TV, y_T, loss, weight_T=weight_T)
        for x in results:
            assert (x[ignored_T] == 0).all()
        alone = differentiated(z_TV[~ignored_T], y_T[~ignored_T], loss, weight_T=weight_T[~ignored_T])
        for x, there in zip(results, alone, strict=True):
            assert torch.equal(x[~ignored_T], there)


def g9_padded_columns_are_never_read_and_get_exactly_0(loss: TokenLoss) -> None:
    for padding in (0.0, 1e9, float("nan"), float("inf"), -float("inf")):
        z_TV, y_T = logits(20, 13), labels(20, 10, ignored=0.2)
        z_TV[:, 10:] = padding
        loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, loss, Vocab(10))
        narrow = differentiated(z_TV[:, :10], y_T, loss)
        for x, there in zip((loss_T, cross_entropy_T, g_TV[:, :10]), narrow, strict=True):
            torch.testing.assert_close(x, there, **EXACT)
        assert (g_TV[:, 10:] == 0).all()


def g10_logits_of_10_000_stay_finite(loss: TokenLoss) -> None:
    for dtype in DTYPES:
        z_TV = logits(64, 10).sign() * 1e4
        z_TV[0], z_TV[1] = 1e4, -1e4
        z_TV[2:32] += logits(30, 10, seed=1)
        for x in differentiated(z_TV.to(dtype), labels(64, 10), loss):
            assert x.isfinite().all()


def g10_bf16_logits_are_summed_in_fp32_and_the_gradient_is_rounded_once(loss: TokenLoss) -> None:
    z_TV, y_T = logits(200, 301).bfloat16(), labels(200, 301, ignored=0.1)
    loss_T, cross_entropy_T, g_TV = differentiated(z_TV, y_T, loss)
    exact_T, exact_cross_entropy_T, _ = differentiated(z_TV.double(), y_T, loss)
    assert loss_T.dtype == cross_entropy_T.dtype == torch.float32
    for x, there in ((loss_T, exact_T), (cross_entropy_T, exact_cross_entropy_T)):
        assert (x - there).abs().max() <= 1e-5 * there.abs().max()
    single_T, _, single_TV = differentiated(z_TV.float(), y_T, loss)
    assert torch.equal(loss_T, single_T)
    assert g_TV.dtype == torch.bfloat16
    assert torch.equal(g_TV, single_TV.bfloat16())


def the_measured_gradient_is_autograds(loss: TokenLoss) -> None:
    for dtype in DTYPES:
        z_TV, y_T = logits(40, 14).to(dtype), labels(40, 11, ignored=0.2)
        _, _, g_TV = differentiated(z_TV, y_T, loss, Vocab(11))
        before_TV = z_TV.clone()
        assert torch.equal(logit_gradient(z_TV, y_T, loss, Vocab(11)), g_TV)
        assert torch.equal(z_TV, before_TV)


def a_tokens_loss_depends_on_its_own_logits_only(loss: TokenLoss) -> None:
    z_TV, y_T = logits(12, 9), labels(12, 9)
    loss_T, _, g_TV = differentiated(z_TV, y_T, loss)
    for half in (slice(0, 5), slice(5, 12)):
        part_T, _, part_TV = differentiated(z_TV[half], y_T[half], loss)
        torch.testing.assert_close(part_T, loss_T[half], **EXACT)
        torch.testing.assert_close(part_TV, g_TV[half], **EXACT)


CHECKS: tuple[Callable[[TokenLoss], None], ...] = (
    equals_its_definition,
    reports_cross_entropy_without_a_gradient,
    overwriting_gives_the_same_gradient_in_the_storage_of_the_logits,
    without_overwriting_the_logits_are_unchanged,
    g7_ignored_labels_have_loss_and_gradient_0,
    g9_padded_columns_are_never_read_and_get_exactly_0,
    g10_logits_of_10_000_stay_finite,
    g10_bf16_logits_are_summed_in_fp32_and_the_gradient_is_rounded_once,
    the_measured_gradient_is_autograds,
    a_tokens_loss_depends_on_its_own_logits_only,
)
