"""GEM's properties G1 to G10 (arXiv 2408.16673). G5, equality over shards, is in test_shards.py; G7, G9 and G10 hold
for every objective and are in common_checks.py.

Shapes: T tokens, V columns.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.objectives.token.gem import GEM
from tests.objectives.token.token_cases import differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Z_TV, Y_T = logits(50, 13, seed=5), labels(50, 13, seed=5)
betas = st.floats(0.05, 1.0)


def linear(beta: float) -> GEM:
    return GEM(beta=beta)


def logsigmoid(beta: float, c: float) -> GEM:
    return GEM(beta=beta, h="logsigmoid", slope=c)


def test_g1_beta_1_is_cross_entropy_less_the_entropy() -> None:
    loss_T, cross_entropy_T, g_TV = differentiated(Z_TV, Y_T, linear(1.0))
    log_p_TV = Z_TV.log_softmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    torch.testing.assert_close(loss_T, cross_entropy_T - entropy_T, **EXACT)
    one_hot_TV = torch.nn.functional.one_hot(Y_T, 13)
    torch.testing.assert_close(g_TV, log_p_TV.exp() - one_hot_TV, **EXACT)


@given(betas)
def test_g2_the_gradient_is_that_of_tempered_cross_entropy(beta: float) -> None:
    _, _, g_TV = differentiated(Z_TV, Y_T, linear(beta))
    z_TV = Z_TV.clone().requires_grad_()
    tempered = beta * torch.nn.functional.cross_entropy(z_TV / beta, Y_T, reduction="sum")
    torch.testing.assert_close(g_TV, torch.autograd.grad(tempered, z_TV)[0], **EXACT)


@given(betas, st.one_of(st.none(), st.floats(0.001, 5.0)))
def test_g3_the_gradient_sums_to_0(beta: float, c: float | None) -> None:
    _, _, g_TV = differentiated(Z_TV, Y_T, linear(beta) if c is None else logsigmoid(beta, c))
    torch.testing.assert_close(g_TV.sum(-1), torch.zeros_like(g_TV[:, 0]), **EXACT)


@given(betas, st.one_of(st.none(), st.floats(0.001, 5.0)), st.floats(-100, 100))
def test_g4_a_constant_on_all_logits_changes_nothing(beta: float, c: float | None, constant: float) -> None:
    objective = linear(beta) if c is None else logsigmoid(beta, c)
    here, there = (differentiated(z_TV, Y_T, objective) for z_TV in (Z_TV, Z_TV + constant))
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)  # the constant rounds off digits of the logits


def test_g6_towards_beta_0_only_the_most_probable_token_competes() -> None:
    """A label that is already the most probable token has no gradient."""
    loss_T, _, g_TV = differentiated(Z_TV, Y_T, linear(1e-6))
    best_T = Z_TV.argmax(-1)
    assert 0 < (best_T == Y_T).sum() < len(Y_T)
    one_hot = torch.nn.functional.one_hot
    assert torch.equal(g_TV, (one_hot(best_T, 13) - one_hot(Y_T, 13)).double())
    assert (g_TV[best_T == Y_T] == 0).all()
    torch.testing.assert_close(loss_T, Z_TV.amax(-1) - Z_TV.gather(1, Y_T[:, None])[:, 0], **EXACT)


@pytest.mark.parametrize("beta", [1.0, 0.7, 0.4])
def test_g8_the_optimum_is_the_datas_distribution_to_the_power_of_beta(beta: float) -> None:
    """Uses the exact expectation over labels. Takes gradient steps: the gradient is not that of the loss's value."""
    p_V = torch.tensor([0.02, 0.05, 0.08, 0.1, 0.15, 0.25, 0.35], dtype=torch.float64)
    z_V = logits(1, 7, seed=3)[0]
    for _ in range(2000):
        _, _, g_VV = differentiated(z_V.expand(7, 7), torch.arange(7), linear(beta), weight_T=p_V)
        z_V = z_V - 2 * beta * g_VV.sum(0)
    expected_V = p_V**beta
    torch.testing.assert_close(z_V.softmax(-1), expected_V / expected_V.sum(), rtol=0, atol=1e-4)


@given(betas, st.one_of(st.none(), st.floats(0.001, 5.0)))
def test_closed_forms_need_no_log_sum_exp(beta: float, c: float | None) -> None:
    """L = sum a z - S z_y and dL/dz = a - S e_y, with a = q w and S = sum a."""
    z_y_T1 = Z_TV.gather(1, Y_T[:, None])
    w_TV = torch.ones_like(Z_TV) if c is None else (c * (Z_TV - z_y_T1)).sigmoid()
    a_TV = (Z_TV / beta).softmax(-1) * w_TV
    s_T1 = a_TV.sum(-1, keepdim=True)
    loss_T, _, g_TV = differentiated(Z_TV, Y_T, linear(beta) if c is None else logsigmoid(beta, c))
    torch.testing.assert_close(loss_T, (a_TV * Z_TV).sum(-1) - (s_T1 * z_y_T1)[:, 0], **EXACT)
    torch.testing.assert_close(g_TV, a_TV.scatter_add(1, Y_T[:, None], -s_T1), **EXACT)


def test_the_authors_slope_makes_about_half_the_linear_loss() -> None:
    half, whole = (o.loss(Z_TV, Y_T).mean() for o in (logsigmoid(0.7, 0.01), linear(0.7)))
    loss_T, _, _ = differentiated(Z_TV, Y_T, logsigmoid(0.7, 0.01))
    torch.testing.assert_close(loss_T.mean(), half, **EXACT)
    assert half / whole == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": 1.1}, {"beta": -0.5}, {"slope": 0.0}])
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GEM(**wrong)
