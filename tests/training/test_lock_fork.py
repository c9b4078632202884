"""Locks, Forks and the dispersion of futures, against plain counting and known flows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.training.auxiliary_loss import Anchors
from megatron_sfr.training.lock_fork import LockFork, LockForkOptions

B, S, A, D, H = 2, 12, 5, 64, 3


class KnownFlow:
    """A head whose futures of sample b are all the b-th axis, v = (x_1 - x) / (1 - t), or noise, v = 0."""

    dim = D
    state = SimpleNamespace(target_mean=torch.zeros(D), target_std=torch.ones(D))

    def __init__(self, settled: bool) -> None:
        self.settled = settled

    def __call__(self, x: Tensor, t: Tensor, h: Tensor, horizon: Tensor) -> Tensor:
        if not self.settled:
            return torch.zeros_like(x)
        return (torch.eye(D)[:B, None, None] - x) / (1 - t)


def make_anchors() -> Anchors:
    position = torch.tensor([[0, 3, 5, 5, 9], [1, 2, 4, 8, 0]])
    horizon = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    weight = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    sample = torch.tensor([[7], [8]]).expand(B, A)
    return Anchors(position, sample, position, horizon, weight, torch.zeros(B, A, D))


def look(head: Any, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    entropy, top = (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    lock_fork = LockFork(LockForkOptions(**options), TargetOptions())
    return entropy, top, lock_fork.at_anchors(head, torch.zeros(B, A, H), make_anchors(), entropy, top, split=False)


@pytest.mark.parametrize(("settled", "forks_count"), [(False, True), (True, False)])
def test_anchors_of_the_first_horizon_are_counted(settled: bool, forks_count: bool) -> None:
    limits = {"lock_entropy": 0.5, "lock_top": 0.4, "fork_entropy": 0.6, "fork_dispersion": 0.5}
    entropy, top, sums = look(KnownFlow(settled), **limits)

    at = [(0, 0), (0, 3), (0, 5), (0, 9), (1, 1), (1, 2), (1, 4), (1, 8)]
    locks = [entropy[i] for i in at if entropy[i] <= 0.5 and top[i] >= 0.4]
    forks = [entropy[i] for i in at if entropy[i] >= 0.6 and forks_count]
    assert locks
    counts = [len(at), len(locks), len(forks), sum(entropy[i] for i in at), sum(locks), sum(forks)]
    assert sums[:6].tolist() == pytest.approx([float(x) for x in counts])


def test_dispersion_is_0_for_one_future_and_1_for_independent_ones() -> None:
    for settled, expected, tolerance in ((True, 0, 1e-5), (False, 1, 0.05)):  # 8 anchors of 28 pairs, std 1/8 each
        sums = look(KnownFlow(settled))[2]
        assert (sums[6] / sums[0]).item() == pytest.approx(expected, abs=tolerance)


def test_without_a_head_all_supervised_positions_count() -> None:
    entropy, top = (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.zeros(B, S)
    mask[:, 4:9] = 1
    sums = LockFork(LockForkOptions(lock_entropy=0.1, fork_entropy=0.5), TargetOptions()).at_positions(
        entropy, top, mask
    )
    chosen = entropy[:, 4:9]
    assert sums[0] == 10
    assert sums[2] == (chosen >= 0.5).sum()
    assert sums[3].item() == pytest.approx(chosen.sum().item())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"interval": -1}, "give at least 0"), ({"lock_entropy": 2.0}, "below `fork_entropy`")],
)
def test_impossible_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LockForkOptions(**options)
