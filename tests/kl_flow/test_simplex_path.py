"""Properties K1 to K5 and K7 of KL-flow's path on the simplex (Logit-KL Flow Matching, arXiv 2411.16821), in float64.

Shapes: V tokens, B points; l log-probabilities, x = softmax(l), t time, b smoothing.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sfr.kl_flow.simplex_path import Simplex, log_dirichlet

B = 6
SIZES, SMOOTHINGS = st.integers(2, 40), st.floats(1e-4, 0.5)
TIMES = st.floats(0, 0.95)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def points(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ln x_0 [B, V] of x_0 ~ Dirichlet(1), with its true constant, and tokens [B]."""
    g = torch.Generator().manual_seed(seed)
    l_0 = torch.empty(B, size, dtype=torch.float64).exponential_(generator=g).log().log_softmax(-1)
    return l_0, torch.randint(size, (B,), generator=g)


def smoothed(simplex: Simplex, token_B: Tensor) -> Tensor:
    """l_1 by its definition: [B, V]."""
    V, b = simplex.size, simplex.b
    one = torch.nn.functional.one_hot(token_B, V).double()
    return (one * (1 - b) + b / V).log()


def path(simplex: Simplex, l_0: Tensor, token_B: Tensor, t: float) -> Tensor:
    """l_t with its true constant."""
    return simplex.between(l_0.clone(), token_B, torch.full((B,), t, dtype=l_0.dtype)) + t * simplex.low


@given(SIZES, SMOOTHINGS, TIMES)
def test_k1_the_velocity_at_a_known_token_is_that_of_the_line(size: int, b: float, t: float) -> None:
    """v(l_t) = (l_1 - l_t) / (1 - t) = l_1 - l_0, and by finite differences."""
    simplex, (l_0, token_B) = Simplex(size, b), points(size)
    l_1, p = smoothed(simplex, token_B), torch.nn.functional.one_hot(token_B, size).double()
    v = simplex.velocity(path(simplex, l_0, token_B, t), p, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(v, l_1 - l_0, rtol=1e-10, atol=1e-10)
    difference = (path(simplex, l_0, token_B, t + 1e-3) - path(simplex, l_0, token_B, t)) / 1e-3
    torch.testing.assert_close(difference, v, rtol=1e-8, atol=1e-8)


@given(SIZES, SMOOTHINGS, TIMES)
def test_k2_the_point_is_the_geometric_mixture(size: int, b: float, t: float) -> None:
    simplex, (l_0, token_B) = Simplex(size, b), points(size)
    mixed = l_0.exp() ** (1 - t) * smoothed(simplex, token_B).exp() ** t
    x_t = path(simplex, l_0, token_B, t).softmax(-1)
    torch.testing.assert_close(x_t, mixed / mixed.sum(-1, keepdim=True), **EXACT)


@given(SIZES, SMOOTHINGS)
def test_k3_euler_with_a_known_token_converges_to_the_path_at_first_order(size: int, b: float) -> None:
    """In t' = -ln(1 - t): N steps h = t'_max / N; half the step, half the error."""
    simplex, (l_0, token_B), t = Simplex(size, b), points(size), 0.6
    p = torch.nn.functional.one_hot(token_B, size).double()
    there = path(simplex, l_0, token_B, t).log_softmax(-1)
    errors = []
    for steps in (64, 128):
        l, h = l_0, -math.log(1 - t) / steps
        for _ in range(steps):
            l = simplex.euler(l, p, h)
        errors.append((l.log_softmax(-1) - there).norm().item())
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)
    assert errors[1] < 0.02 * there.norm().item()


@given(SIZES, SMOOTHINGS, TIMES, st.floats(-50, 50))
def test_k4_a_constant_moves_no_point(size: int, b: float, t: float, shift: float) -> None:
    simplex, (l_0, token_B) = Simplex(size, b), points(size)
    p = l_0.flip(-1).exp()
    for there in (lambda l: path(simplex, l, token_B, t), lambda l: simplex.euler(l, p, 0.1)):
        torch.testing.assert_close(there(l_0 + shift).softmax(-1), there(l_0).softmax(-1), rtol=1e-10, atol=1e-12)


@given(SIZES, SMOOTHINGS)
def test_k5_the_path_leads_from_the_noise_to_the_smoothed_token(size: int, b: float) -> None:
    simplex, (l_0, token_B) = Simplex(size, b), points(size)
    torch.testing.assert_close(path(simplex, l_0, token_B, 0.0), l_0, **EXACT)
    x_1 = path(simplex, l_0, token_B, 1.0).exp()
    torch.testing.assert_close(x_1, smoothed(simplex, token_B).exp(), rtol=1e-10, atol=1e-12)
    mass = torch.full((B,), 1 - b + b / size, dtype=torch.float64)
    torch.testing.assert_close(x_1.gather(-1, token_B[:, None])[:, 0], mass, rtol=1e-10, atol=1e-12)


@given(SIZES, SMOOTHINGS)
def test_k7_the_expected_log_probabilities_are_the_mixture_of_the_tokens(size: int, b: float) -> None:
    simplex, (l_0, _) = Simplex(size, b), points(size)
    p = l_0.exp()
    each = smoothed(simplex, torch.arange(size))  # a row for each token
    torch.testing.assert_close(simplex.expected(p), p @ each, rtol=1e-10, atol=1e-10)


def test_the_gap_is_the_papers_at_gpt_2s_vocabulary() -> None:
    assert Simplex(50257, 0.01).gap == pytest.approx(15.42, abs=0.01)


def test_a_token_of_another_shard_raises_no_column() -> None:
    """Two shards side by side equal the whole vocabulary."""
    simplex, (l_0, token_B) = Simplex(8), points(8)
    t_B = torch.linspace(0, 0.9, B, dtype=torch.float64)
    parts = []
    for start in (0, 4):
        column_B = torch.where((token_B >= start) & (token_B < start + 4), token_B - start, -1)
        parts.append(simplex.between(l_0[:, start : start + 4].clone(), column_B, t_B))
    assert torch.equal(torch.cat(parts, dim=-1), simplex.between(l_0.clone(), token_B, t_B))


@pytest.mark.parametrize(("size", "b"), [(1, 0.01), (5, 0.0), (5, 1.0)])
def test_fewer_than_2_tokens_or_smoothing_outside_0_to_1_are_refused(size: int, b: float) -> None:
    with pytest.raises(ValueError, match="give at least 2 tokens"):
        Simplex(size, b)


def test_dirichlet_noise_is_uniform_on_the_simplex() -> None:
    """Moments of Dirichlet(1): mean 1/V, variance (V - 1) / (V^2 (V + 1)), covariance -1 / (V^2 (V + 1))."""
    V, sample, zero = 5, torch.arange(40_000), torch.tensor(0)
    x = log_dirichlet(7, sample, zero, zero, V, stream=3).double().softmax(-1)
    assert (x.mean(0) - 1 / V).abs().max() < 0.003
    expected = (torch.eye(V, dtype=torch.float64) - 1 / V) / (V * (V + 1))
    assert (torch.cov(x.T) - expected).abs().max() < 0.0006
