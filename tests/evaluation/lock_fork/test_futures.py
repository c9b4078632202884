"""Futures of a real flow head that is trained on a lock and a fork: vectors, clusters and information gain."""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import DEFAULT, TargetStore
from megatron_sfr.evaluation.lock_fork.futures import FutureOptions, Futures, Scale, futures, nearest
from megatron_sfr.evaluation.lock_fork.token_statistics import Positions
from megatron_sfr.flow.information import relative_entropy
from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_errors, draw_noise, weighted_sum
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, scale_targets
from tests.objectives.closed_forms import gaussian_mixture_velocity

D, H = 8, 2
LOCK, FORK = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
FUTURES = torch.eye(D)[:3]  # after a lock always the first, after a fork the second or the third


def make_head(**plan: object) -> FlowHead:
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=1, cuda_graph_modules=[])
    return FlowHead(config, FlowHeadPlan(FlowHeadOptions(width=64, time_scale=10.0), dim=D, **plan)).eval()


@cache
def trained(scale: str) -> tuple[FlowHead, Scale]:
    """A head after 600 steps of SFR's own loss."""
    head, B, g = make_head().train(), 256, torch.Generator().manual_seed(0)
    mean = (FUTURES[0] / 2) + (FUTURES[1] + FUTURES[2]) / 4
    std = (torch.stack([FUTURES[0], FUTURES[0], FUTURES[1], FUTURES[2]]) - mean).square().mean(0).sqrt()
    options, sfr = TargetOptions(scale=scale), SFROptions()
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    place = torch.zeros(B, 1, dtype=torch.int64)
    for step in range(600):
        forks = torch.rand(B, 1, generator=g) < 0.5
        future = torch.where(forks, torch.randint(1, 3, (B, 1), generator=g), 0)
        x_1 = scale_targets(FUTURES[future], mean, std, options)
        h = torch.where(forks[..., None], FORK, LOCK)
        x_0, t = draw_noise(torch.arange(B)[:, None] + step * B, place, place, D, 0, sfr)
        errors = anchor_errors(lambda x, t, h: head(x, t, h, place), h, x_1, torch.ones(B, 1), x_0, t, sfr)
        optimizer.zero_grad()
        (weighted_sum(*errors) / B).backward()
        optimizer.step()
        decay.step()
    return head.eval(), Scale(mean, std, options)


def at(n: int) -> Positions:
    """n positions of sample 4; other fields are not used here."""
    empty = np.zeros(n)
    return Positions(np.full(n, 4), np.arange(n), empty, empty, empty)


def draw(head: FlowHead, scale: Scale, h: Tensor, **options: object) -> Futures:
    return futures(head, h, at(len(h)), scale, FutureOptions(**{"samples": 32, **options}))


@pytest.mark.parametrize("scale", ["l2", "sqrt_d", "whiten"])
def test_a_fork_has_two_futures_and_a_lock_has_one(scale: str) -> None:
    head, its_scale = trained(scale)
    actual = draw(head, its_scale, torch.stack([LOCK, FORK, LOCK, FORK]))
    assert actual.dispersion[[0, 2]].max() < 0.15
    assert actual.dispersion[[1, 3]].min() > 0.35  # two orthogonal directions: about 0.5
    for n, expected in ((0, {0}), (1, {1, 2}), (3, {1, 2})):
        said = (torch.from_numpy(actual.vectors[n]).float() @ FUTURES.T).argmax(-1).tolist()
        assert expected <= set(said)
        assert np.isin(said, list(expected)).mean() > 0.9
    sizes = [np.bincount(row).max() for row in actual.groups]  # size of the largest cluster
    assert min(sizes[0], sizes[2]) >= 28
    assert max(sizes[1], sizes[3]) <= 24
    assert (actual.clusters == [len(set(row)) for row in actual.groups.tolist()]).all()


def test_P6_the_gain_equals_that_of_the_learnt_distributions() -> None:
    """Against the exact velocities of one and of two points, relative to the same Gaussian, up to the same end.

    The gain does not distinguish forks: both hidden states are equally probable, so each gives ln 2 about the three
    points. The rest depends on the distance of the points from the Gaussian's mean.
    """
    head, scale = trained("sqrt_d")
    actual = draw(head, scale, torch.stack([LOCK, FORK]), samples=64, end=0.9).gain
    g = torch.Generator().manual_seed(5)
    for n, points in enumerate((FUTURES[:1], FUTURES[1:])):
        mu = points * D**0.5
        w, s = torch.full((len(mu),), 1 / len(mu)), torch.zeros(len(mu))
        x_1, x_0 = mu[torch.randint(len(mu), (4000,), generator=g)], torch.randn(4000, D, generator=g)
        law = partial(gaussian_mixture_velocity, w=w, mu=mu, s=s)
        exact = relative_entropy(law, scale.marginal(), x_1, x_0, nodes=32, end=0.9)
        assert actual[n] == pytest.approx(exact.item(), rel=0.2)


def test_the_gain_of_a_head_that_predicts_0_equals_the_integral() -> None:
    scale = Scale(torch.zeros(D), torch.full((D,), D**-0.5), TargetOptions(scale="sqrt_d"))
    zero = make_head()  # predicts 0; the marginal's velocity is (2t - 1) / (t^2 + (1 - t)^2) x
    actual = draw(zero, scale, torch.stack([LOCK]), samples=4000, end=0.5, nodes=32)
    # Its futures are noise: E|v|^2 = D (2t - 1)^2 / (t^2 + (1 - t)^2), to be integrated against t / (1 - t).
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 200_000
    exact = (D * (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2) * t / (1 - t)).mean() / 2
    assert actual.gain[0] == pytest.approx(exact.item(), rel=0.03)


def test_futures_depend_on_their_own_position_and_the_seed() -> None:
    """Other positions and batch sizes change only rounding; another seed changes every future."""
    head, scale = trained("sqrt_d")
    h = torch.randn(150, H, generator=torch.Generator().manual_seed(1))
    everything = draw(head, scale, h, samples=4, steps=4)
    alone = futures(head, h[:3], at(3), scale, FutureOptions(samples=4, steps=4))
    np.testing.assert_allclose(alone.vectors, everything.vectors[:3], atol=2e-3)
    np.testing.assert_allclose(alone.gain, everything.gain[:3], rtol=1e-4)
    other = futures(head, h[:3], at(3), scale, FutureOptions(samples=4, steps=4, seed=1))
    assert np.abs(other.vectors - alone.vectors).max() > 0.1


@pytest.mark.parametrize("name", ["l2", "sqrt_d", "whiten"])
def test_unit_vectors_are_recovered_from_every_scale(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    x = F.normalize(torch.randn(5, D, generator=g), dim=-1)
    options = TargetOptions(scale=name)
    scale = Scale(x.mean(0), x.std(0), options)
    torch.testing.assert_close(scale.to_unit(scale_targets(x, x.mean(0), x.std(0), options)), x)


def test_the_nearest_segments_are_found_in_the_store(data: PreparedData) -> None:
    store = TargetStore.open(data.folder / DEFAULT, data)
    rows = np.array([len(store) - 1, 0, 3])
    vectors = store[rows].astype(np.float32)
    for at_once in (2, 65536):
        actual, cosine = nearest(vectors, store, at_once)
        assert (actual == rows).all()
        np.testing.assert_allclose(cosine, 1, atol=2e-3)
    every = vectors @ store[np.arange(len(store))].astype(np.float32).T
    assert every.max(axis=1) == pytest.approx(cosine)


def test_a_head_without_a_network_is_refused() -> None:
    head = make_head(has_network=False)
    scale = Scale(torch.zeros(D), torch.ones(D), TargetOptions())
    with pytest.raises(ValueError, match="sfr_loss = cka"):
        draw(head, scale, torch.stack([LOCK]))
    with pytest.raises(ValueError, match="at least 1"):
        FutureOptions(steps=0)
    assert math.isnan(draw(make_head(), scale, torch.stack([LOCK]), samples=1).dispersion[0])
