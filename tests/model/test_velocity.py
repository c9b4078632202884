"""The two velocity networks: gradients, formulas and initialization."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_sfr.model.velocity import AdaLNVelocity, MLPVelocity, sinusoids

from .heads import A, B, D, H, K, W, inputs, make_head, randomized

KINDS = pytest.mark.parametrize("kind", ["mlp", "adaln"])


@KINDS
def test_velocities_pass_gradcheck_in_float64(kind: str) -> None:
    head = randomized(make_head(kind, depth=1, horizons=3)).double()
    x_t, t, h, horizon = inputs(torch.float64)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def answer(*values: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(names, values[3:], strict=True))
        return torch.func.functional_call(head, weights, (*values[:3], horizon[:1, :2]))

    small = (x_t[:1, :2], t[:1, :2], h[:1, :2])
    given = [x.detach().clone().requires_grad_() for x in (*small, *parameters)]
    assert answer(*given).dtype == torch.float64
    assert torch.autograd.gradcheck(answer, given, fast_mode=True)  # along random directions of all inputs


@pytest.mark.parametrize(("reach_last", "steps"), [(False, 3), (True, 2)])
def test_sinusoids_are_sines_then_cosines_of_geometric_frequencies(reach_last: bool, steps: int) -> None:
    t, dim = torch.tensor([[0.0], [0.3], [1.0]], dtype=torch.float64), 6
    actual = sinusoids(t, dim, 1000.0, reach_last=reach_last)
    for row, time in zip(actual, t[:, 0], strict=True):
        for i in range(3):
            angle = 1000 * time * 10000 ** (-i / steps)
            assert row[i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert row[3 + i].item() == pytest.approx(math.cos(angle), abs=1e-12)
    odd = sinusoids(t, 7, 1000.0, reach_last=reach_last)  # the last feature of an odd dimension is 0
    assert torch.equal(odd, F.pad(actual, (0, 1)))
    for tiny in (2, 3):  # one frequency
        assert sinusoids(t, tiny, 1.0, reach_last=reach_last)[:, 1].tolist() == t[:, 0].cos().tolist()
    for dtype in (torch.float32, torch.bfloat16):
        assert sinusoids(t.to(dtype), dim, 1.0).dtype == torch.float32


def test_the_time_scale_separates_nearby_times() -> None:
    near = torch.tensor([[0.5], [0.501]])
    ours, authors = (sinusoids(near, 16, scale) for scale in (1000.0, 1.0))
    assert (ours[0] - ours[1]).abs().max() > 0.1
    assert (authors[0] - authors[1]).abs().max() < 0.01


def test_splitting_the_first_product_equals_one_linear_on_the_concatenation() -> None:
    head = randomized(make_head(horizons=3)).double()
    net = head.net
    assert isinstance(net, MLPVelocity)
    x_t, t, h, horizon = inputs(torch.float64)
    time = net.time_out(F.silu(net.time_in(sinusoids(t, D, 10.0, reach_last=True))))
    first = torch.cat([part.weight for part in (net.input_x, net.input_t, net.input_h)], dim=1)
    x = F.linear(torch.cat([x_t, time, h.expand(B, A, K, H)], dim=-1), first, net.input_x.bias)
    x = F.silu(net.norm(x + net.horizon.weight[horizon][:, :, None]))
    for block in net.blocks:
        x = x + F.silu(block.norm(block.linear(x)))
    torch.testing.assert_close(head(x_t, t, h, horizon), net.output(x), rtol=1e-13, atol=1e-13)


def test_the_first_linear_is_initialised_as_one_of_all_its_inputs() -> None:
    with torch.random.fork_rng():
        net = MLPVelocity(24, 16, 64, 1, 1, 1.0)
    net.initialize(torch.Generator().manual_seed(0))
    bound = (2 * 24 + 16) ** -0.5
    for p in (net.input_x.weight, net.input_t.weight, net.input_h.weight, net.input_x.bias):
        assert 0.9 * bound < p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert 0.99 * 64**-0.5 < net.blocks[0].linear.weight.abs().max() <= 64**-0.5  # other Linears by their own fan-in
    assert 0.99 * 24**-0.5 < net.time_in.weight.abs().max() <= 24**-0.5


def test_adalns_modulations_start_at_zero_and_its_blocks_as_the_identity() -> None:
    net = make_head("adaln", horizons=3).net
    assert isinstance(net, AdaLNVelocity)
    for linear in (*(block.modulation for block in net.blocks), net.modulation, net.output):
        assert not linear.weight.any()
        assert not linear.bias.any()
    x, condition = torch.randn(B, A, K, W), torch.randn(B, A, K, W)
    for block in net.blocks:
        assert torch.equal(block(x, condition), x)
        torch.nn.init.ones_(block.modulation.bias)
        assert not torch.equal(block(x, condition), x)


def test_adaln_with_zero_modulations_depends_only_on_x() -> None:
    head = make_head("adaln")
    torch.nn.init.ones_(head.net.output.weight)
    x_t, t, h, horizon = inputs()
    expected = head.net.output(head.net.norm(head.net.input_x(x_t)))
    assert torch.equal(head(x_t, t, h, horizon), expected)
    assert torch.equal(head(x_t, 1 - t, -h, horizon), expected)


@KINDS
def test_the_velocity_depends_on_every_input(kind: str) -> None:
    head = randomized(make_head(kind, horizons=3))
    given = inputs()
    whole = head(*given)
    assert whole.shape == (B, A, K, D)
    for i in range(4):
        changed = [x + (j == i) * (1 - 2 * x if i == 3 else 1) for j, x in enumerate(given)]
        changed[3] = changed[3].remainder(3)
        assert not torch.equal(head(*changed), whole)
    other = head(*given[:3], torch.ones(B, A, dtype=torch.int64))
    same = given[3] == 1
    torch.testing.assert_close(other[same], whole[same])
    assert (other[~same] - whole[~same]).abs().amax((1, 2)).min() > 1e-3


@KINDS
def test_a_single_horizon_has_no_embedding(kind: str) -> None:
    assert make_head(kind).net.horizon is None
    assert make_head(kind, horizons=2).net.horizon.weight.shape == (2, W)
