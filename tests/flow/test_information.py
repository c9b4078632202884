"""P6: information in nats, against the closed forms of Gaussians."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sfr.flow.information import gaussian_velocity, information, relative_entropy
from tests.objectives.closed_forms import gaussian_loss


def full(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [full(1.0), full(1.0, 0.7, 2.0)])
def test_P6_the_mutual_information_of_gaussians_is_ln_of_the_ratio_of_spreads(sigma: Tensor) -> None:
    s = full(0.5).expand(len(sigma))
    gain = information(lambda t: (gaussian_loss(t, sigma) - gaussian_loss(t, s)).sum(), nodes=200)
    assert gain.item() == pytest.approx((sigma / s).log().sum().item(), abs=1e-10)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0, 0.0), (0.5, 0.8)), ((0.7, -1.2), (0.3, 1.0)), ((0.0, 0.0), (1.0, 1.0))]
)
def test_relative_entropy_of_two_gaussians(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """D(N(m, s^2) || N(0, 1)) = sum_d [(s^2 + m^2 - 1) / 2 - ln s], by samples; the last 1e-4 of time adds little."""
    p, q = gaussian_velocity(full(*mean), full(*std)), gaussian_velocity(full(0, 0), full(1, 1))
    g = torch.Generator().manual_seed(1)
    z, x_0 = torch.randn(2, 3, 20_000, 2, dtype=torch.float64, generator=g)
    actual = relative_entropy(p, q, full(*mean) + full(*std) * z, x_0, nodes=64, end=0.9999)
    exact = sum((s**2 + m**2 - 1) / 2 - math.log(s) for m, s in zip(mean, std, strict=True))
    assert actual.shape == (3,)
    torch.testing.assert_close(actual, full(exact).expand(3), atol=2e-3, rtol=0.02)


def test_the_mean_relative_entropy_to_the_marginal_is_the_mutual_information() -> None:
    """x_1 | h ~ N(h, s^2) and h ~ N(0, 1 - s^2): gains differ between positions; their mean is ln(1 / s)."""
    s, g = 0.6, torch.Generator().manual_seed(2)
    h = math.sqrt(1 - s**2) * torch.randn(4000, 1, 1, dtype=torch.float64, generator=g)
    z, x_0 = torch.randn(2, 4000, 8, 1, dtype=torch.float64, generator=g)
    p, q = gaussian_velocity(h, full(s)), gaussian_velocity(full(0), full(1))
    gain = relative_entropy(p, q, h + s * z, x_0, nodes=48, end=0.9999)
    assert gain.std() > 0.2
    assert gain.mean().item() == pytest.approx(math.log(1 / s), abs=0.02)
