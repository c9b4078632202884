"""Targets at the three scales against numpy, and the running statistics against a direct recursion."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.sfr.target_scale import (
    SMALLEST,
    TargetOptions,
    batch_moments,
    running_statistics,
    scale_targets,
)

D = 16


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.nn.functional.normalize(x, dim=-1)


def statistics_of(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = np.average(x, axis=0, weights=w)
    return mean, np.average((x - mean) ** 2, axis=0, weights=w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_equal_numpys(dtype: torch.dtype) -> None:
    x = embeddings(5, 7).to(dtype)
    numbers = x.float().numpy()
    mean, std = numbers.mean((0, 1)), numbers.std((0, 1))
    expected = {"l2": numbers, "sqrt_d": numbers * np.float32(4), "whiten": (numbers - mean) / std}
    for scale, values in expected.items():
        actual = scale_targets(x, torch.from_numpy(mean), torch.from_numpy(std), TargetOptions(scale=scale))
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual.numpy(), values, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(actual.numpy().std((0, 1)), 1, rtol=1e-5)


def test_a_constant_dimension_stays_finite_when_whitened() -> None:
    x = embeddings(20)
    x[:, 3] = 0.25
    mean, std = x.mean(0), x.std(0, correction=0)
    std[3] = 0
    white = scale_targets(x, mean.float(), std.float(), TargetOptions(scale="whiten"))
    assert white.isfinite().all()
    assert white[:, 3].abs().max() < 1e-5
    x[0, 3] += 0.01  # deviations are divided by SMALLEST / sqrt(D)
    white = scale_targets(x, mean.float(), std.float(), TargetOptions(scale="whiten"))
    assert white[0, 3].item() == pytest.approx(0.01 / (SMALLEST / D**0.5), rel=1e-4)


def test_before_the_first_batch_whitening_by_an_ema_is_sqrt_d() -> None:
    x = embeddings(4)
    start = torch.zeros(D), torch.full((D,), D**-0.5)  # as the head's state starts
    white, root = (scale_targets(x, *start, TargetOptions(scale=scale)) for scale in ("whiten", "sqrt_d"))
    torch.testing.assert_close(white, root)


def test_moments_of_parts_add_up_to_those_of_the_whole_and_skip_padding() -> None:
    x, w = embeddings(3, 5), torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    w[1, 2:] = 0
    parts = sum(batch_moments(x[i], w[i]) for i in range(3))
    torch.testing.assert_close(parts, batch_moments(x, w), rtol=1e-13, atol=0)
    mean, variance = statistics_of(x.reshape(-1, D).numpy(), w.flatten().double().numpy())
    actual = parts.numpy() / parts[0].item()
    np.testing.assert_allclose(actual[1 : D + 1], mean, rtol=1e-12)
    np.testing.assert_allclose(actual[D + 1 :] - mean**2, variance, rtol=1e-10)
    other = x.clone()
    other[1, 2:] = 1e3
    assert torch.equal(batch_moments(other, w), batch_moments(x, w))


def test_the_first_batch_replaces_the_initial_statistics_and_later_ones_are_averaged() -> None:
    decay, state = 0.75, (torch.full((D,), 9.0), torch.full((D,), 7.0), torch.zeros(1))
    mean = variance = None
    for step in range(4):
        x, w = embeddings(50, seed=step) * (step + 1), torch.ones(50)
        state = running_statistics(batch_moments(x, w), *state, decay)
        new = statistics_of(x.numpy(), w.numpy())
        if step == 0:
            mean, variance = new
        else:
            mean, variance = (decay * old + (1 - decay) * y for old, y in zip((mean, variance), new, strict=True))
        np.testing.assert_allclose(state[0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[1], variance**0.5, rtol=1e-5)
        assert state[2].item() == step + 1
    assert {x.dtype for x in state} == {torch.float32}


def test_decay_0_keeps_only_the_last_batch() -> None:
    state = (torch.zeros(D), torch.ones(D), torch.tensor([5.0]))
    x = embeddings(30)
    mean, variance = statistics_of(x.numpy(), np.ones(30))
    actual = running_statistics(batch_moments(x, torch.ones(30)), *state, 0.0)
    np.testing.assert_allclose(actual[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual[1], variance**0.5, rtol=1e-5)


@pytest.mark.parametrize("seen", [0.0, 3.0])
def test_an_empty_batch_changes_nothing(seen: float) -> None:
    state = (torch.rand(D), torch.rand(D), torch.tensor([seen]))
    actual = running_statistics(batch_moments(embeddings(4), torch.zeros(4)), *state, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(actual, state, strict=True))


def test_a_constant_dimension_gives_a_spread_of_0_not_nan() -> None:
    x = embeddings(40)
    x[:, 3] = 1 / 3
    _, std, _ = running_statistics(batch_moments(x, torch.ones(40)), torch.zeros(D), torch.ones(D), torch.zeros(1), 0.9)
    assert std.isfinite().all()
    assert std[3] < 1e-6


def test_a_decay_outside_its_range_is_refused() -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="whiten_decay"):
            TargetOptions(whiten_decay=decay)
