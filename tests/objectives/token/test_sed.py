"""SED's properties S1 to S4 (arXiv 2602.07464). S5, equality over shards and ties, is in test_shards.py; S6 and S7, on
the threshold's calibration, in tests/evaluation/test_sed_threshold.py.

Shapes: T tokens, V columns.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sfr.kernels.plain import row_statistics
from megatron_sfr.kernels.vocab_parallel import combine
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.sed import SED, top_mass
from tests.objectives.token.token_cases import differentiated, labels, logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Z_TV, Y_T = logits(60, 13, seed=9), labels(60, 13, seed=9)
weights = st.floats(0.0, 10.0)


def sed(weight: float = 1.0, k: int = 3, tau: float = 0.7) -> SED:
    return SED(tau, weight, k)


def masses(z_TV: Tensor, k: int) -> Tensor:
    """P_k of each row, as the loss computes it."""
    none_T = torch.full(z_TV.shape[:1], -1)
    stats_TN = row_statistics(z_TV, none_T, none_T.to(z_TV.dtype), beta=1.0, moments=False, c=0.0, top_k=k)
    return top_mass(combine(stats_TN[None], 1.0))


def spread_over_two(p: Tensor) -> Tensor:
    """Logits of two columns whose first has probability p: [T, 2]."""
    return torch.stack([p.logit(), torch.zeros_like(p)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [sed(weight=0.0), sed(tau=0.0), sed(tau=-1.0)], ids=["lambda 0", "tau 0", "-1"])
def test_s1_without_weight_or_threshold_it_is_cross_entropy_bit_for_bit(objective: SED, dtype: torch.dtype) -> None:
    plain, other = (differentiated(Z_TV.to(dtype), Y_T, o) for o in (CrossEntropy(), objective))
    for x, y in zip(plain, other, strict=True):
        assert torch.equal(x, y)


def test_the_log_has_the_squared_term_and_the_exempt_share() -> None:
    objective = sed(weight=0.8)
    loss_T, cross_entropy_T, _ = differentiated(Z_TV.float(), Y_T, objective)
    held_T = masses(Z_TV.float(), 3) < 0.7
    assert 0.1 < held_T.float().mean() < 0.9
    logged = objective.logged(loss_T, cross_entropy_T)
    term_T = torch.where(held_T, 0.8 * ((-cross_entropy_T).exp() - 0.5) ** 2, 0)
    torch.testing.assert_close(logged["sed squared term"], term_T, rtol=0, atol=1e-6)
    assert torch.equal(logged["sed exempt"], (~held_T).float())
    assert CrossEntropy().logged(loss_T, cross_entropy_T) == {}


@pytest.mark.parametrize("k", [1, 3, 13, 20])
def test_s1_above_1_the_threshold_exempts_no_token(k: int) -> None:
    loss_T, cross_entropy_T, _ = differentiated(Z_TV, Y_T, sed(weight=0.8, k=k, tau=1.01))
    p_T = (-cross_entropy_T).exp()
    torch.testing.assert_close(loss_T, cross_entropy_T + 0.8 * (p_T - 0.5) ** 2, **EXACT)


@given(weights, st.integers(1, 16), st.sampled_from([0.3123, 0.6123, 0.9123]))
def test_s2_the_gradient_is_cross_entropys_times_a_gain(weight: float, k: int, tau: float) -> None:
    """It sums to 0."""
    objective = sed(weight, k, tau)
    _, cross_entropy_T, g_TV = differentiated(Z_TV, Y_T, objective)
    _, _, plain_TV = differentiated(Z_TV, Y_T, CrossEntropy())
    p_T = (-cross_entropy_T).exp()
    mask_T = (Z_TV.softmax(-1).sort(descending=True).values[:, :k].sum(-1) < tau).double()
    gain_T = 1 - 2 * weight * mask_T * p_T * (p_T - 0.5)
    torch.testing.assert_close(g_TV, gain_T[:, None] * plain_TV, **EXACT)
    torch.testing.assert_close(g_TV.sum(-1), torch.zeros_like(p_T), rtol=0, atol=1e-12)


@given(weights)
def test_s3_the_penalty_is_between_0_and_a_quarter_of_lambda(weight: float) -> None:
    loss_T, cross_entropy_T, _ = differentiated(Z_TV, Y_T, sed(weight, tau=2.0))
    penalty_T = loss_T - cross_entropy_T
    assert (penalty_T >= -1e-12).all()
    assert (penalty_T <= weight / 4 + 1e-12).all()


def test_s3_it_is_0_where_the_label_has_half_of_the_mass() -> None:
    loss_T, cross_entropy_T, g_TV = differentiated(torch.zeros(1, 2), torch.tensor([0]), sed(3.0, tau=2.0))
    assert torch.equal(loss_T, cross_entropy_T)
    assert loss_T.item() == pytest.approx(math.log(2))
    assert g_TV.tolist() == [[-0.5, 0.5]]


@given(st.floats(1.0625, 50.0))
def test_s3_above_lambda_1_the_label_converges_to_a_probability_below_1(weight: float) -> None:
    """At p* = (1 + sqrt(1 + 8 / lambda)) / 4: below it the label is pushed up, above it down."""
    rest = (1 + math.sqrt(1 + 8 / weight)) / 4
    p_T = torch.tensor([0.5 * rest, rest - 1e-3, rest, (rest + 1) / 2], dtype=torch.float64)
    _, _, g_TV = differentiated(spread_over_two(p_T), torch.zeros(4, dtype=torch.int64), sed(weight, tau=2.0))
    up_T = -g_TV[:, 0]
    assert (up_T[:2] > 0).all()
    assert up_T[2].abs() < 1e-9
    assert up_T[3] < 0


def test_s3_at_lambda_1_the_label_converges_to_probability_1() -> None:
    p_T = torch.linspace(0.01, 0.999, 50, dtype=torch.float64)
    _, _, g_TV = differentiated(spread_over_two(p_T), torch.zeros(50, dtype=torch.int64), sed(1.0, tau=2.0))
    assert (g_TV[:, 0] < 0).all()
    gain_T = -g_TV[:, 0] / (1 - p_T)
    assert gain_T.max() <= 1.125 + 1e-12
    assert p_T[gain_T.argmax()].item() == pytest.approx(0.25, abs=0.02)


@given(st.integers(0, 500), st.integers(1, 30), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_s4_the_top_mass_grows_with_k_from_the_largest_probability_to_1(
    seed: int, columns: int, grid: bool, dtype: torch.dtype
) -> None:
    z_TV = logits(6, columns, seed=seed, grid=grid).to(dtype)
    p_Tk = torch.stack([masses(z_TV, k) for k in range(1, columns + 3)], dim=1)
    assert (p_Tk > 0).all()
    assert (p_Tk <= 1).all()
    assert (p_Tk.diff(dim=1) >= -4 * torch.finfo(dtype).eps).all()
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(p_Tk[:, 0], z_TV.softmax(-1).amax(-1), **close)
    torch.testing.assert_close(p_Tk[:, columns - 1 :], torch.ones_like(p_Tk[:, columns - 1 :]), **close)


def test_a_token_at_the_threshold_is_exempt() -> None:
    z_TV = torch.zeros(1, 4)  # P_2 = 1/2 exactly
    exempt, held_back = (differentiated(z_TV, torch.tensor([0]), sed(1.0, 2, tau)) for tau in (0.5, 0.5 + 1e-6))
    assert torch.equal(exempt[0], exempt[1])
    assert held_back[0] > held_back[1]


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"top_k": 0}, {"top_k": 129}])
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SED(0.5, **wrong)
