"""The distributions of the flow's noise and times: which draws are shared and which are independent."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, draw_noise

B, A, D = 200, 25, 4


def draw(first: int = 0, horizon: int = 0, **changes: object) -> tuple[Tensor, Tensor]:
    position = torch.arange(A).expand(B, A)
    sample = torch.arange(B)[:, None]
    return draw_noise(sample, position, torch.full_like(position, horizon), D, first, SFROptions(**changes))


def distance(x: Tensor, law: Tensor) -> float:
    """The Kolmogorov-Smirnov statistic times sqrt(n), from the distribution function at sorted x."""
    n = x.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((law - steps[:-1]).abs().max(), (law - steps[1:]).abs().max()).item() * math.sqrt(n)


def correlation(x: Tensor, y: Tensor) -> float:
    """The correlation of two tensors' entries times sqrt(n): about N(0, 1) if they are independent."""
    x, y = ((z.double() - z.double().mean()).flatten() for z in (x, y))
    return (x @ y / (x.norm() * y.norm())).abs().item() * math.sqrt(len(x))


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_times_follow_their_distribution(time: str) -> None:
    t = draw(time=time)[1].double().flatten().sort().values
    law = t if time == "uniform" else torch.special.ndtr(t.logit())
    assert t.min() > 0
    assert t.max() < 1
    assert distance(t, law) < 1.63  # the 1 % critical value


def test_sources_are_normally_distributed() -> None:
    x_0 = draw()[0].double().flatten().sort().values
    assert distance(x_0, torch.special.ndtr(x_0)) < 1.63


def test_zero_time_and_zero_source_are_zero() -> None:
    x_0, t = draw(time="zero")
    assert x_0.std() == pytest.approx(1, abs=0.01)
    assert not t.any()
    x_0, t = draw(time="zero", source="zero")
    assert x_0.shape == (B, A, 1, D)  # one deterministic pair, whatever sfr_draws is
    assert t.shape == (B, A, 1, 1)
    assert not x_0.any()
    assert not t.any()


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_time_is_drawn_per_anchor_or_per_sequence(time: str) -> None:
    each, shared, elsewhere = (
        draw(time=time, time_per="anchor")[1],
        draw(time=time, time_per="sequence"),
        draw(time=time, time_per="sequence", horizon=1),
    )
    assert len(each[0, :, 0].unique()) == A
    assert len(shared[1][0, :, 0].unique()) == 1
    assert len(shared[1].unique()) == B * SFROptions().draws
    assert len(shared[0].unique()) > 0.99 * shared[0].numel()  # sources still differ between anchors
    assert torch.equal(shared[1], elsewhere[1])
    assert correlation(shared[0], elsewhere[0]) < 4


def test_horizons_at_one_position_have_separate_noise_and_time() -> None:
    for x, y in zip(draw(horizon=0), draw(horizon=1), strict=True):
        assert not (x == y).all(-1).any()
        assert correlation(x, y) < 4


def test_a_second_set_of_draws_is_independent_of_the_first_and_continues_it() -> None:
    K = SFROptions().draws
    both = draw(draws=2 * K)
    for x, y, whole in zip(draw(), draw(first=K), both, strict=True):
        assert correlation(x, y) < 4
        assert torch.equal(torch.cat([x, y], dim=2), whole)


def test_neighbours_are_independent_and_the_seed_matters() -> None:
    x_0, t = draw()
    for x in (x_0, t):
        assert correlation(x[:, 1:], x[:, :-1]) < 4  # anchors
        assert correlation(x[1:], x[:-1]) < 4  # samples
        assert correlation(x[:, :, 1:], x[:, :, :-1]) < 4  # draws
    assert correlation(x_0[..., :1], t) < 4
    other = draw(noise_seed=1235)
    assert correlation(x_0, other[0]) < 4
    assert correlation(t, other[1]) < 4
