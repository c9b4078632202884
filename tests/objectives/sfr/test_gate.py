"""The gradient gate: its two modes, its baselines in bins of t, and why a single bin reacts to the drawn times."""

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.sfr.gate import GateOptions, decide, sums_by_time
from tests.objectives.closed_forms import gaussian_loss


def dynamic(**changes: object) -> GateOptions:
    return GateOptions(kind="dynamic", **changes)


def sums(errors: list[float], weights: list[float]) -> Tensor:
    e, w = torch.tensor(errors), torch.tensor(weights)
    return torch.stack([w * e, w])


def test_sums_by_time_equal_a_loop() -> None:
    B, A, K, bins = 3, 4, 5, 8
    g = torch.Generator().manual_seed(0)
    error, weight = torch.rand(B, A, K, generator=g, dtype=torch.float64), torch.rand(B, A, 1, generator=g).double()
    t = torch.rand(B, A, K, generator=g).double()
    t[0, 0, 0], t[0, 0, 1] = 0, 1  # both ends belong to a bin
    expected = torch.zeros(2, bins, dtype=torch.float64)
    for b in range(B):
        for a in range(A):
            for k in range(K):
                i = min(int(t[b, a, k] * bins), bins - 1)
                expected[0, i] += weight[b, a, 0] * error[b, a, k]
                expected[1, i] += weight[b, a, 0]
    actual = sums_by_time(error.requires_grad_(), weight, t, bins)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)
    assert not actual.requires_grad


def test_sums_of_one_bin_are_those_of_the_loss() -> None:
    error, weight = torch.rand(2, 3, 4), torch.rand(2, 3, 1)
    actual = sums_by_time(error, weight, torch.rand(2, 3, 4), 1)
    torch.testing.assert_close(actual[:, 0], torch.stack([(weight * error).sum(), 4 * weight.sum()]))


def test_the_static_gate_compares_the_mean_loss_with_a_threshold() -> None:
    options = GateOptions(kind="static", threshold=0.5)
    for errors, is_open in (([0.9, 0.2], 1.0), ([0.7, 0.2], 0.0), ([0.5, 0.5], 1.0)):
        gate, _ = decide(sums(errors, [1.0, 1.0]), torch.zeros(2), options)
        assert gate.tolist() == [is_open]
    assert decide(sums([0.9, 0.2], [1.0, 3.0]), torch.zeros(2), options)[0].item() == 0  # weighted: 0.375
    assert decide(torch.zeros(2, 2), torch.zeros(2), options)[0].item() == 1  # a step without anchors


def test_the_dynamic_gate_compares_the_loss_with_its_baseline() -> None:
    options, baseline = dynamic(ratio=1.5), torch.tensor([0.9])
    for error, is_open in ((0.61, 1.0), (0.59, 0.0)):  # 0.9 / 1.5 = 0.6
        gate, _ = decide(sums([error], [4.0]), baseline, options)
        assert gate.tolist() == [is_open]


def test_the_current_baseline_includes_the_loss_that_it_is_compared_with() -> None:
    # l < (0.99 b + 0.01 l) / 1.5, so l < 0.99 / 1.49 b = 0.664 b; without the step's own loss l < 0.667 b.
    for compares, edge in (("previous", 1 / 1.5), ("current", 0.99 / 1.49)):
        options = dynamic(baseline=compares)
        for factor, is_open in ((1.0001, 1.0), (0.9999, 0.0)):
            gate, baseline = decide(sums([factor * edge * 0.9], [4.0]), torch.tensor([0.9]), options)
            assert gate.tolist() == [is_open]
            assert baseline.item() == pytest.approx(0.99 * 0.9 + 0.01 * factor * edge * 0.9)
        assert decide(sums([0.5], [1.0]), torch.zeros(1), options)[0].item() == 1  # the first step has no baseline


def test_baselines_start_with_the_first_loss_and_decay_where_a_bin_was_drawn() -> None:
    options = dynamic(decay=0.75)
    gate, baseline = decide(sums([0.8, 5.0], [2.0, 0.0]), torch.zeros(2), options)
    assert gate.item() == 1  # nothing to compare with
    torch.testing.assert_close(baseline, torch.tensor([0.8, 0.0]))
    _, baseline = decide(sums([0.4, 0.2], [1.0, 1.0]), baseline, options)
    torch.testing.assert_close(baseline, torch.tensor([0.75 * 0.8 + 0.25 * 0.4, 0.2]))
    gate, same = decide(torch.zeros(2, 2), baseline, options)
    assert gate.item() == 1
    assert torch.equal(same, baseline)


def test_bins_without_a_baseline_are_excluded() -> None:
    # Bin 0 fell far below its baseline. Bin 1 is new and high: it must not keep the gate open.
    options, baseline = dynamic(), torch.tensor([1.0, 0.0])
    assert decide(sums([0.1, 100.0], [1.0, 1.0]), baseline, options)[0].item() == 0
    # And a new bin with a low loss must not close it.
    assert decide(sums([1.0, 0.0], [1.0, 100.0]), baseline, options)[0].item() == 1
    # Nor must the baseline of a bin without draws in this step.
    assert decide(sums([1.0, 0.0], [1.0, 0.0]), torch.tensor([1.0, 50.0]), options)[0].item() == 1


def gate_after(bins: int, times: Tensor, progress: float) -> float:
    """The gate after steps at all times, then one at `times`, with the optimal loss of a Gaussian at 1/32 each."""

    def step(t: Tensor, factor: float) -> Tensor:
        return sums_by_time(factor * gaussian_loss(t, 1 / 32), torch.ones(()), t, bins)

    baseline, g = torch.zeros(bins), torch.Generator().manual_seed(0)
    for _ in range(50):
        gate, baseline = decide(step(torch.rand(1000, generator=g), 1.0), baseline, dynamic(bins=bins))
        assert gate.item() == 1  # with many times per step even one bin is stable
    return decide(step(times, progress), baseline, dynamic(bins=bins))[0].item()


def test_with_one_bin_the_gate_follows_the_drawn_times_and_with_8_the_progress() -> None:
    # In the authors' code t is per sequence, so a step of few sequences may draw only times of low loss.
    early = 0.3 * torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert gate_after(1, early, progress=1.0) == 0  # closes without any progress
    assert gate_after(8, early, progress=1.0) == 1
    assert gate_after(8, early, progress=0.1) == 0  # closes because the loss fell


def test_impossible_options_are_refused() -> None:
    for wrong in ({"ratio": 0.9}, {"decay": 1.0}, {"bins": 0}, {"bins": 1025}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GateOptions(**wrong)
