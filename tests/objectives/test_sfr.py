"""SFR's loss against closed forms, and the properties that a right implementation has (numbered P)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.flow.path import interpolate
from megatron_sfr.objectives.sfr import (
    SFROptions,
    anchor_weights,
    draw_noise,
    flow_matching_loss,
    scale_targets,
)

from .closed_forms import gaussian_mixture_velocity

torch.manual_seed(0)


def unit_targets(B: int, A: int, D: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(B, A, D, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.mark.parametrize(("scale", "expected"), [("l2", 1 + 1 / 32), ("sqrt_d", 2.0)])
def test_P1_a_zero_head_costs_the_variance_of_noise_and_target(scale: str, expected: float) -> None:
    B, A, D = 64, 8, 32
    options = SFROptions(sfr_target_scale=scale, sfr_draws=8)
    position = torch.arange(A).expand(B, A)
    x_0, t = draw_noise(torch.arange(B), position, D, 0, options)
    x_1 = scale_targets(unit_targets(B, A, D), options)
    loss = flow_matching_loss(lambda x, t, h: torch.zeros_like(x), torch.zeros(B, A, 3), x_1, torch.ones(B, A), x_0, t)
    assert loss == pytest.approx((x_1[:, :, None] - x_0).square().mean(dim=(2, 3)).sum().item(), rel=1e-6)
    assert loss / (B * A) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("s", "minimum"), [(1 / 32, 0.0491), (1.0, math.pi / 2)])
def test_P5_the_best_velocity_for_a_gaussian_costs_s_pi_half(s: float, minimum: float) -> None:
    # t on a grid instead of drawn: the integral over t of the exact conditional variance has no noise left but x's.
    T, N = 400, 500
    g = torch.Generator().manual_seed(2)
    t = ((torch.arange(T, dtype=torch.float64) + 0.5) / T)[:, None, None].expand(T, N, 1)
    x_0, x_1 = (torch.randn(T, N, 1, dtype=torch.float64, generator=g) for _ in range(2))
    x_t, v = interpolate(x_0, s * x_1, t)
    one = torch.ones(1, dtype=torch.float64)
    best = gaussian_mixture_velocity(x_t, t, one, torch.zeros(1, 1, dtype=torch.float64), s * one)
    assert (best - v).square().mean() == pytest.approx(minimum, rel=0.02)


def test_P3_P4_a_head_trained_by_this_loss_finds_the_mixtures_velocity_and_both_modes() -> None:
    # One hidden state with two equally right futures at -1 and +1: the loss's optimum keeps both.
    B, K, mu = 512, 4, torch.tensor([[-1.0], [1.0]])
    options = SFROptions(sfr_target_scale="l2", sfr_draws=K)
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU())
    net.append(torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    g = torch.Generator().manual_seed(3)
    for step in range(500):
        x_1 = mu[torch.randint(0, 2, (B, 1), generator=g)] + 0.3 * torch.randn(B, 1, 1, generator=g)
        x_0, t = draw_noise(torch.arange(B) + step * B, torch.zeros(B, 1, dtype=torch.int64), 1, 0, options)
        loss = flow_matching_loss(
            lambda x, t, h: net(torch.cat([x, t], -1)), torch.zeros(B, 1, 1), x_1, torch.ones(B, 1), x_0, t
        )
        optimizer.zero_grad()
        (loss / B).backward()
        optimizer.step()
        decay.step()
    x, t = torch.linspace(-1.2, 1.2, 41)[:, None], torch.full((41, 1), 0.3)
    exact = gaussian_mixture_velocity(x, t, torch.full((2,), 0.5), mu, torch.full((2,), 0.3))
    with torch.no_grad():
        assert (net(torch.cat([x, t], -1)) - exact).abs().mean() < 0.15
        x, steps = torch.randn(4000, 1, generator=g), 40
        for i in range(steps):
            x = x + net(torch.cat([x, torch.full_like(x, i / steps)], -1)) / steps
    assert (x > 0).float().mean() == pytest.approx(0.5, abs=0.06)
    assert (x.abs() - 1).abs().mean() < 0.3  # samples stand at the modes, not at their mean 0


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 8))
def test_weights_of_each_response_sum_to_its_tokens(lengths: list[list[int]], stride: int) -> None:
    for responses in lengths:
        rows = [(j, n, r) for r, n in enumerate(responses) for j in range(0, n, stride)]
        ordinal, length, response = np.array(rows).T
        weights = anchor_weights(ordinal, length, response)
        for r, n in enumerate(responses):
            mine = weights[response == r]
            assert mine.sum() == pytest.approx(n, rel=1e-5)
            assert np.allclose(mine / mine[0], 1 - ordinal[response == r] / n, rtol=1e-5)  # (N - pos + 1) / N
    assert len(anchor_weights(*(np.zeros(0, dtype=np.int32),) * 3)) == 0


def test_anchors_of_weight_0_cost_nothing_and_get_no_gradient() -> None:
    B, A, D, H = 3, 4, 8, 5
    h = torch.randn(B, A, H, requires_grad=True)
    x_0, t = draw_noise(torch.arange(B), torch.zeros(B, A, dtype=torch.int64), D, 0, SFROptions())
    weight = torch.ones(B, A)
    weight[1] = 0
    loss = flow_matching_loss(lambda x, t, h: x * h.sum(-1, keepdim=True), h, unit_targets(B, A, D), weight, x_0, t)
    loss.backward()
    assert not h.grad[1].any()
    assert h.grad[0].any()


def test_P9_noise_belongs_to_the_sample_not_to_its_place_in_a_batch() -> None:
    options = SFROptions(sfr_time_per="anchor")
    samples, position = torch.tensor([7, 3, 9]), torch.tensor([[1, 5], [2, 5], [8, 4]])
    whole = draw_noise(samples, position, 6, 0, options)
    part = draw_noise(samples[[2, 1]], position[[2, 1]], 6, 0, options)
    later = draw_noise(samples, position, 6, options.sfr_draws, options)
    for x, y, z in zip(whole, part, later, strict=True):
        assert torch.equal(x[[2, 1]], y)
        assert not torch.equal(x, z)


def test_time_is_drawn_per_anchor_or_per_sequence() -> None:
    position = torch.arange(5).expand(2, 5)
    each = draw_noise(torch.arange(2), position, 4, 0, SFROptions(sfr_time_per="anchor"))[1]
    shared = draw_noise(torch.arange(2), position, 4, 0, SFROptions(sfr_time_per="sequence"))[1]
    assert len(each[0, :, 0].unique()) == 5
    assert len(shared[0, :, 0].unique()) == 1
    assert len(shared.unique()) == 2 * SFROptions().sfr_draws
