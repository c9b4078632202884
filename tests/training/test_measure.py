"""The measured gradients are autograd's, the signal share is one, and the steered weight goes where it must."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sfr.model.flow_head import Measured
from megatron_sfr.training.measure import GradientMeasurement, cross_entropy_power, flow_powers


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_cross_entropys_power_at_h_is_autograds() -> None:
    S, B, H, V = 4, 2, 6, 10
    g = torch.Generator().manual_seed(0)
    h = torch.randn(S, B, H, generator=g, requires_grad=True)
    weight, mask = torch.randn(V, H, generator=g), torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0]])
    labels = torch.randint(0, V, (B, S), generator=g)
    logits = h @ weight.T
    losses = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    (losses * mask).sum().backward()
    found = cross_entropy_power(logits.detach(), labels, mask, weight)
    assert found == pytest.approx(h.grad.square().sum().item(), rel=1e-5)


def test_signal_is_the_share_of_power_that_two_draws_of_noise_have_in_common() -> None:
    g = torch.Generator().manual_seed(1)
    h, common = torch.zeros(40, 40, 8), torch.randn(40, 40, 8, generator=g)

    def with_noise(size: float) -> tuple:
        gradients = [common + size * torch.randn(h.shape, generator=g) for _ in "ab"]
        return tuple(partial(lambda g, h: (h * g).sum(), gradient) for gradient in gradients)

    for size, share in ((0.0, 1.0), (1.0, 0.5), (2.0, 0.2)):
        powers = flow_powers(with_noise(size), h, sharded=False)
        measured = Measured(1.0)
        GradientMeasurement(0.1, 1.0).add(0, 1, torch.cat([torch.ones(1), powers]), measured)
        assert measured.signal.item() == pytest.approx(share, abs=0.03)


def test_the_weight_goes_to_the_wanted_ratio_and_stays_in_bounds() -> None:
    measured, measurement = Measured(1.0), GradientMeasurement(target_ratio=0.1, base_weight=1.0)
    half = torch.tensor([50.0, 2.0, 2.0, 1.0])  # two microbatches: |g_CE|^2 = 100, |g_SFR|^2 = 4
    measurement.add(0, 2, half, measured)
    assert measured.ratio == 0  # nothing is known before the last microbatch
    measurement.add(0, 2, half, measured)
    assert measured.ratio.item() == pytest.approx(0.2)
    assert measured.weight.item() == pytest.approx(0.5)  # 0.5 * 0.2 = 0.1
    for step in range(1, 40):
        measurement.add(step, 1, torch.tensor([100.0, 1e-12, 1e-12, 0.0]), measured)
    assert measured.weight.item() == pytest.approx(100.0)


def test_a_head_that_pulls_at_nothing_leaves_what_is_known() -> None:
    measured = Measured(0.7)
    GradientMeasurement(0.1, 0.7).add(0, 1, torch.tensor([1.0, 0.0, 0.0, 0.0]), measured)
    assert [b.item() for b in measured.buffers()] == pytest.approx([0.0, 0.0, 0.7])
