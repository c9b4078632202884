"""SFR's loss against closed forms, and the properties of a correct implementation (numbered P)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_sfr.flow.path import interpolate
from megatron_sfr.objectives.sfr.sfr_loss import (
    SFROptions,
    anchor_errors,
    anchor_weights,
    draw_noise,
    flow_matching_loss,
    weighted_sum,
)
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, scale_targets
from tests.objectives.closed_forms import gaussian_loss, gaussian_mixture_velocity, over_unit_interval

MODES, SPREAD, SHARES = torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.3), torch.tensor([0.5, 0.5])


def unit_targets(B: int, A: int, D: int) -> Tensor:
    return nn.functional.normalize(torch.randn(B, A, D, generator=torch.Generator().manual_seed(1)), dim=-1)


def first_horizon(position_BA: Tensor) -> Tensor:
    return torch.zeros_like(position_BA)


@pytest.mark.parametrize(("scale", "expected"), [("l2", 1 + 1 / 32), ("sqrt_d", 2.0)])
def test_P1_a_zero_head_costs_the_variance_of_noise_and_target(scale: str, expected: float) -> None:
    B, A, D = 64, 8, 32
    options, none = SFROptions(draws=8), torch.zeros(D)
    position = torch.arange(A).expand(B, A)
    x_0, t = draw_noise(torch.arange(B)[:, None], position, first_horizon(position), D, 0, options)
    x_1 = scale_targets(unit_targets(B, A, D), none, none, TargetOptions(scale=scale))
    error, weight = anchor_errors(
        lambda x, t, h: torch.zeros_like(x), torch.zeros(B, A, 3), x_1, torch.ones(B, A), x_0, t, options
    )
    assert torch.equal(error, (x_1[:, :, None] - x_0).square().mean(-1))
    assert weighted_sum(error, weight) / (B * A) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("s", "minimum"), [(1 / 32, 0.0491), (1.0, math.pi / 2)])
def test_P5_the_best_velocity_for_a_gaussian_costs_s_pi_half(s: float, minimum: float) -> None:
    # t is on a grid, not drawn, so that only x contributes sampling noise to the integral over t.
    T, N = 400, 500
    g = torch.Generator().manual_seed(2)
    t = ((torch.arange(T, dtype=torch.float64) + 0.5) / T)[:, None, None].expand(T, N, 1)
    x_0, x_1 = (torch.randn(T, N, 1, dtype=torch.float64, generator=g) for _ in range(2))
    x_t, v = interpolate(x_0, s * x_1, t)
    one = torch.ones(1, dtype=torch.float64)
    best = gaussian_mixture_velocity(x_t, t, one, torch.zeros(1, 1, dtype=torch.float64), s * one)
    assert (best - v).square().mean() == pytest.approx(minimum, rel=0.02)


def test_P5_knowing_h_reduces_the_loss_by_the_difference_of_spreads_times_pi_half() -> None:
    t, dt = over_unit_interval(200)
    saved = (dt * (gaussian_loss(t, 1.0) - gaussian_loss(t, 0.25))).sum()
    assert saved == pytest.approx((1.0 - 0.25) * math.pi / 2, rel=1e-10)


@pytest.mark.parametrize("sigma_D", [[1.0], [1.0, 0.7, 2.0]])
def test_P6_information_gain_of_gaussians_is_ln_of_the_ratio_of_their_spreads(sigma_D: list[float]) -> None:
    # I(h; x_1) = int_0^1 [L(t) - L(t | h)] t / (1 - t) dt nats, with L summed over dimensions.
    sigma, s = torch.tensor(sigma_D, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    t, dt = over_unit_interval(200)
    gain = gaussian_loss(t[:, None], sigma).sum(-1) - gaussian_loss(t[:, None], s).expand(-1, len(sigma)).sum(-1)
    assert (dt * gain * t / (1 - t)).sum() == pytest.approx((sigma / s).log().sum().item(), abs=1e-10)


def test_P6_information_gain_of_the_mode_of_a_mixture_is_ln_2() -> None:
    # h identifies one of two equally probable, well separated modes of x_1: one bit, ln 2 nats.
    spread, modes, share = (x.double() for x in (SPREAD / 3, MODES, SHARES))
    t, dt = over_unit_interval(120)
    z = torch.linspace(-9, 9, 2401, dtype=torch.float64)  # x_t = t mu + sqrt(var) z: by symmetry one mode is enough
    var = t**2 * spread[0] ** 2 + (1 - t) ** 2
    x = t[:, None] + var.sqrt()[:, None] * z
    v = gaussian_mixture_velocity(x[..., None], t[:, None, None], share, modes, spread)[..., 0]
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    known = 1 + (t * spread[0] ** 2 - (1 - t))[:, None] / var[:, None] * (x - t[:, None])  # v* given the mode +1
    gain = (density * (v - known).square()).sum(-1) * (z[1] - z[0])  # L(t) - L(t | h) = E (v* - v*_h)^2
    assert (dt * gain * t / (1 - t)).sum() == pytest.approx(math.log(2), abs=1e-6)


def train(net: nn.Module, answer: Callable[..., Tensor], options: SFROptions, steps: int) -> None:
    """Trains with the loss of the options, for one hidden state (0) with futures at MODES with weights SHARES."""
    B, g = 512, torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    place, h, ones = torch.zeros(B, 1, dtype=torch.int64), torch.zeros(B, 1, 1), torch.ones(B, 1)
    for step in range(steps):
        mode = (torch.rand(B, 1, generator=g) < SHARES[1]).long()
        x_1 = MODES[mode] + SPREAD[mode][..., None] * torch.randn(B, 1, 1, generator=g)
        x_0, t = draw_noise(torch.arange(B)[:, None] + step * B, place, place, 1, 0, options)
        loss = weighted_sum(*anchor_errors(answer, h, x_1, ones, x_0, t, options)) / B
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def make_net() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A small network as a function of x and t, which are rescaled so that it trains quickly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    return net, lambda x, t: net(3 * torch.cat([x, t], -1))


def test_P3_P4_a_head_trained_by_this_loss_finds_the_mixtures_velocity_and_both_modes() -> None:
    net, answer = make_net()
    train(net, lambda x, t, h: answer(x, t), SFROptions(), 400)
    x, t = torch.linspace(-1.2, 1.2, 41)[:, None], torch.full((41, 1), 0.3)
    exact = gaussian_mixture_velocity(x, t, SHARES, MODES, SPREAD)
    with torch.no_grad():
        assert (answer(x, t) - exact).abs().mean() < 0.15
        x, steps = torch.randn(4000, 1, generator=torch.Generator().manual_seed(4)), 40
        for i in range(steps):
            x = x + answer(x, torch.full_like(x, i / steps)) / steps
    assert (x > 0).float().mean() == pytest.approx(SHARES[1].item(), abs=0.06)
    assert (x.abs() - 1).abs().mean() < 0.3  # samples are at the modes, not at their mean


def test_P4_the_mse_ablation_on_the_same_data_predicts_only_the_mean() -> None:
    net, answer = make_net()
    train(net, lambda x, t, h: answer(x, t), SFROptions(loss="mse"), 150)
    assert answer(torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(0, abs=0.05)  # no future is near it


def test_P4_the_flow_of_the_exact_velocity_carries_noise_to_the_mixture() -> None:
    n, steps = 1001, 200
    w, mu, s = torch.tensor([0.3, 0.7], dtype=torch.float64), MODES.double(), SPREAD.double()
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]  # N(0, 1) by its quantiles
    for i in range(steps):  # midpoint rule
        t = torch.full((n, 1), (i + 0.5) / steps, dtype=torch.float64)
        half = x + gaussian_mixture_velocity(x, t - 0.5 / steps, w, mu, s) / (2 * steps)
        x = x + gaussian_mixture_velocity(half, t, w, mu, s) / steps
    law = (w * torch.special.ndtr((x - mu.T) / s)).sum(-1)  # the mixture's own quantiles, in order
    assert (law - (torch.arange(n) + 0.5) / n).abs().max() < 2e-3
    assert (x > 0).double().mean() == pytest.approx(0.7, abs=2e-3)


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


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_anchors_of_weight_0_have_no_loss_and_no_gradient(loss: str) -> None:
    B, A, D, H = 3, 4, 8, 5
    options = SFROptions(loss=loss)
    g = torch.Generator().manual_seed(5)
    h = torch.randn(B, A, H, generator=g, requires_grad=True)
    place = torch.zeros(B, A, dtype=torch.int64)
    x_0, t = draw_noise(torch.arange(B)[:, None], place, place, D, 0, options)
    weight = torch.ones(B, A)
    weight[1] = 0

    def total(x_1: Tensor) -> Tensor:
        error, w = anchor_errors(lambda x, t, h: (1 + x) * h.sum(-1, keepdim=True), h, x_1, weight, x_0, t, options)
        return weighted_sum(error, w)

    x_1 = unit_targets(B, A, D)
    total(x_1).backward()
    assert not h.grad[1].any()
    assert h.grad[0].any()
    other = x_1.clone()
    other[1] = 7
    assert torch.equal(total(x_1), total(other))


def test_P9_noise_depends_on_the_sample_not_on_its_index_in_the_batch() -> None:
    options = SFROptions(time_per="anchor")
    samples = torch.tensor([[7], [3], [9]])
    position, horizon = torch.tensor([[1, 5], [2, 5], [8, 4]]), torch.tensor([[0, 1], [2, 0], [0, 0]])
    whole = draw_noise(samples, position, horizon, 6, 0, options)
    part = draw_noise(samples[[2, 1]], position[[2, 1]], horizon[[2, 1]], 6, 0, options)
    swapped = draw_noise(samples, position.flip(1), horizon.flip(1), 6, 0, options)
    later = draw_noise(samples, position, horizon, 6, options.draws, options)
    for x, y, s, z in zip(whole, part, swapped, later, strict=True):
        assert torch.equal(x[[2, 1]], y)
        assert torch.equal(x.flip(1), s)
        assert not torch.equal(x, z)


def test_impossible_options_are_refused() -> None:
    for draws in (0, 1025):
        with pytest.raises(ValueError, match="draws"):
            SFROptions(draws=draws)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": torch.zeros(2, 8)},
        {"targets": torch.zeros(2, 1, 4)},
        {"samples": torch.zeros(2, dtype=torch.int64)},
        {"positions": torch.zeros(3, dtype=torch.int64)},
        {"positions": torch.zeros(2, 3)},
        {"horizons": torch.zeros(2, 3, dtype=torch.int32)},
    ],
)
def test_anchors_that_do_not_fit_are_refused_in_one_line(change: dict[str, Tensor]) -> None:
    """Shapes that broadcast would give a loss that means nothing."""
    whole = torch.zeros(2, 3, dtype=torch.int64)
    given = {
        "hidden": torch.zeros(2, 3, 8),
        "targets": torch.zeros(2, 3, 4),
        "samples": whole[:, :1],
        "positions": whole,
    }
    assert flow_matching_loss(lambda x, t, h, horizons: x, **given).shape == (2, 3)
    with pytest.raises(ValueError, match=r"^hidden \(.* do not fit: give [^\n]*$"):
        flow_matching_loss(lambda x, t, h, horizons: x, **given | change)
