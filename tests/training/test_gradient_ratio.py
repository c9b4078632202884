"""The measured gradient norms equal autograd's, and the noise-free share and the adaptive weight are correct."""

from functools import partial

import pytest
import torch

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.model.state import FlowState
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.loss_base import IGNORED
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from megatron_sfr.training.auxiliary_loss import StepSums
from megatron_sfr.training.gradient_ratio import GradientMeasurement, flow_powers, token_power
from tests.objectives.token.token_cases import ALL_LOSSES

pytestmark = pytest.mark.usefixtures("one_rank")


def make_state(weight: float) -> FlowState:
    return FlowState(weight, dim=3, bins=2)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_the_token_objectives_squared_gradient_norm_equals_autograds(name: str) -> None:
    T, H, V, real = 12, 6, 12, 10  # two padding columns
    g = torch.Generator().manual_seed(0)
    h = torch.randn(T, H, generator=g, requires_grad=True)
    weight, y = torch.randn(V, H, generator=g), torch.randint(0, real, (T,), generator=g)
    y[::4] = IGNORED
    logits, objective, vocab = h @ weight.T, ALL_LOSSES[name], Vocab(real)
    before = logits.detach().clone()
    actual = token_power(logits.detach(), y, objective, vocab, weight)
    vocab_parallel_loss(logits, y, objective, vocab)[0].sum().backward()
    assert actual.item() == pytest.approx(h.grad.square().sum().item(), rel=1e-5)
    assert torch.equal(logits, before)  # measuring does not change the logits
    assert not h.grad[::4].any()


def test_cross_entropys_squared_gradient_norm_equals_torchs() -> None:
    g = torch.Generator().manual_seed(1)
    h, weight = torch.randn(8, 6, generator=g, requires_grad=True), torch.randn(10, 6, generator=g)
    y = torch.randint(0, 10, (8,), generator=g)
    torch.nn.functional.cross_entropy(h @ weight.T, y, reduction="sum").backward()
    actual = token_power((h @ weight.T).detach(), y, CrossEntropy(), Vocab(10), weight)
    assert actual.item() == pytest.approx(h.grad.square().sum().item(), rel=1e-5)


def test_flow_powers_equal_those_of_the_two_gradients() -> None:
    g = torch.Generator().manual_seed(2)
    h, one, other = (torch.randn(5, 2, 3, generator=g) for _ in range(3))
    losses = (lambda h: (h.square() * one).sum() / 2, lambda h: (h * other).sum())
    with torch.no_grad():  # as inside an evaluation or a recomputed forward pass
        actual = flow_powers(losses, h.requires_grad_(), sharded=False)
    a, b = (h * one).detach(), other
    torch.testing.assert_close(actual, torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()]))
    assert h.grad is None


def measured_signal(losses: tuple, h: torch.Tensor) -> float:
    state = make_state(1.0)
    powers = torch.cat([torch.ones(1), flow_powers(losses, h, sharded=False)])
    GradientMeasurement(0.1, 1.0).add(0, 1, powers, state)
    return state.signal.item()


def test_the_noise_free_share_is_what_two_noise_draws_have_in_common() -> None:
    g = torch.Generator().manual_seed(1)
    h, common = torch.zeros(40, 40, 8), torch.randn(40, 40, 8, generator=g)
    for size, share in ((0.0, 1.0), (1.0, 0.5), (2.0, 0.2)):
        gradients = [common + size * torch.randn(h.shape, generator=g) for _ in "ab"]
        losses = tuple(partial(lambda g, h: (h * g).sum(), gradient) for gradient in gradients)
        assert measured_signal(losses, h) == pytest.approx(share, abs=0.03)


def test_the_noise_free_share_of_a_deterministic_loss_is_1() -> None:
    h = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3))
    assert measured_signal((lambda h: h.pow(4).sum(),) * 2, h) == pytest.approx(1.0, rel=1e-6)


def test_the_weight_reaches_the_target_ratio_and_stays_in_bounds() -> None:
    measurement, state = GradientMeasurement(0.1, 1.0), make_state(1.0)
    powers = torch.tensor([100.0, 4.0, 4.0, 2.0])  # |g_SFR| / |g_CE| = 0.2 at weight 1
    measurement.add(0, 2, powers / 2, state)
    assert state.ratio.item() == 0  # nothing changes before the step's last microbatch
    measurement.add(0, 2, powers / 2, state)
    assert [state.ratio.item(), state.signal.item(), state.weight.item()] == pytest.approx([0.2, 0.5, 0.5])
    measurement.add(1, 1, torch.tensor([100.0, 1.0, 1.0, 0.5]), state)  # half the gradient norm: twice the weight
    assert state.weight.item() == pytest.approx(0.5**0.5)  # the geometric mean of old and target weight
    for step in range(2, 60):
        at_bound = measurement.add(step, 1, torch.tensor([100.0, 1e-16, 1e-16, 0.0]), state)
    assert at_bound.item()
    assert state.weight.item() == pytest.approx(10_000.0)


def test_a_measurement_in_phase_a_sets_the_weight_without_averaging() -> None:
    measurement, state = GradientMeasurement(0.1, 1.0), make_state(1.0)
    for step, power in ((0, 4.0), (1, 1.0)):
        at_bound = measurement.add(step, 1, torch.tensor([100.0, power, power, 0.5]), state, restart=True)
        assert not at_bound.item()
    assert state.weight.item() == pytest.approx(1.0)  # 0.1 / sqrt(1 / 100), whatever the first measurement was


@pytest.mark.parametrize("powers", [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
def test_a_gradient_of_0_does_not_change_the_state(powers: list[float]) -> None:
    state = make_state(0.7)
    before = {name: x.clone() for name, x in state.state_dict().items()}
    GradientMeasurement(0.1, 0.7).add(0, 1, torch.tensor(powers), state)
    assert all(torch.equal(x, before[name]) for name, x in state.state_dict().items())


def test_step_sums_return_the_sum_over_a_steps_microbatches_and_restart() -> None:
    sums, x = StepSums(), torch.tensor([1.0, 2.0])
    for step in (0, 1, 5):
        assert sums.add(step, 3, x) is None
        assert sums.add(step, 3, 10 * x) is None
        assert sums.add(step, 3, 100 * x).tolist() == [111.0, 222.0]
    assert sums.add(6, 2, x) is None  # an interrupted step is discarded
    assert sums.add(7, 1, x).tolist() == [1.0, 2.0]
    assert x.tolist() == [1.0, 2.0]
