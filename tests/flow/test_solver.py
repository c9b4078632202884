"""The solvers on flows with known solutions: straight lines, a Gaussian and a mixture of Gaussians."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sfr.flow.information import gaussian_velocity
from megatron_sfr.flow.solver import Method, integrate
from tests.objectives.closed_forms import gaussian_mixture_velocity

MEAN, STD = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([0.2, 2.0], dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_constant_velocity_is_followed_exactly_in_one_step(method: Method) -> None:
    x_0 = noise(5, 3)
    torch.testing.assert_close(integrate(lambda x, t: torch.full_like(x, 2.0), x_0, 1, method), x_0 + 2)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_to_a_gaussian_is_mean_plus_std_times_noise(method: Method, order: int) -> None:
    """x_t = t m + sqrt(t^2 s^2 + (1 - t)^2) x_0; doubling the steps divides the error by 2^order."""
    x_0 = noise(7, 2)
    exact = MEAN + STD * x_0
    errors = [
        (integrate(gaussian_velocity(MEAN, STD), x_0, steps, method) - exact).abs().max().item() for steps in (200, 400)
    ]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_P4_noise_is_carried_to_all_modes_of_a_mixture_in_their_shares(method: Method) -> None:
    w, s = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64)
    mu = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    x_1 = integrate(lambda x, t: gaussian_mixture_velocity(x, t, w, mu, s), noise(8000, 2), 64, method)
    distance = torch.cdist(x_1, mu)
    nearest = distance.argmin(-1)
    share = torch.bincount(nearest, minlength=3) / len(x_1)
    torch.testing.assert_close(share.double(), w, atol=0.02, rtol=0)
    for j in range(3):
        mine = x_1[nearest == j]
        torch.testing.assert_close(mine.mean(0), mu[j], atol=0.03, rtol=0)
        assert mine.std(0).mean().item() == pytest.approx(s[j].item(), rel=0.15)


def test_0_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0; give at least 1"):
        integrate(lambda x, t: x, noise(2), 0)
