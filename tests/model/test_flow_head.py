"""The flow head: zero initial output, EMA, independence of the global random stream, and precision."""

import numpy as np
import pytest
import torch
from torch import nn

from megatron_sfr.flow.information import gaussian_velocity
from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_errors, draw_noise

from .heads import A, B, D, H, inputs, make_head, randomized

KINDS = pytest.mark.parametrize("kind", ["mlp", "adaln"])


@KINDS
@pytest.mark.parametrize("horizons", [1, 3])
def test_P1_the_loss_of_a_new_head_is_exactly_mean_v_squared(kind: str, horizons: int) -> None:
    head, options, g = make_head(kind, horizons=horizons), SFROptions(), torch.Generator().manual_seed(1)
    position, horizon = torch.arange(A).expand(B, A), torch.arange(A).expand(B, A) % horizons
    x_0, t = draw_noise(torch.arange(B)[:, None], position, horizon, D, 0, options)
    h, x_1 = torch.randn(B, A, H, generator=g), torch.randn(B, A, D, generator=g)
    error, _ = anchor_errors(lambda x, t, h: head(x, t, h, horizon), h, x_1, torch.ones(B, A), x_0, t, options)
    assert torch.equal(error, (x_1[:, :, None] - x_0).square().mean(-1))


@KINDS
def test_a_new_preconditioned_head_has_the_velocity_of_independent_standard_normals(kind: str) -> None:
    x_t, t, h, horizon = inputs()
    expected = gaussian_velocity(torch.zeros(D), torch.ones(D))(x_t, t)
    torch.testing.assert_close(make_head(kind, precondition=True)(x_t, t, h, horizon), expected)


def test_a_preconditioned_network_reads_and_predicts_unit_variance() -> None:
    """In float64, over the joint distribution of noise and standard normal targets, at each of 9 times."""
    g = torch.Generator().manual_seed(2)
    x_0, x_1 = torch.randn(2, 9, 1, 40_000, D, dtype=torch.float64, generator=g)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None, None, None]
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    head = make_head(precondition=True)
    head.net = None
    object.__setattr__(head, "net", network)
    mean = head((1 - t) * x_0 + t * x_1, t, torch.zeros(H), torch.zeros(1))
    residual = (x_1 - x_0 - mean) * (t.square() + (1 - t).square()).sqrt()
    for unit in (seen[0], residual):
        torch.testing.assert_close(unit.square().mean((2, 3)), torch.ones(9, 1, dtype=torch.float64), rtol=0.02, atol=0)
    assert abs((seen[0] * residual).mean()) < 0.01  # x_t tells nothing more


@KINDS
def test_in_a_new_head_only_the_output_layer_has_a_gradient(kind: str) -> None:
    head = make_head(kind)
    (head(*inputs()) - 1).square().sum().backward()
    moved = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved <= {"net.output.weight", "net.output.bias"}
    assert "net.output.bias" in moved


@KINDS
def test_initial_weights_depend_on_the_seed_and_do_not_advance_the_global_stream(kind: str) -> None:
    torch.manual_seed(9)
    expected = torch.rand(4)
    torch.manual_seed(9)
    one, again, other = (make_head(kind, seed=seed, horizons=2, ema="teacher") for seed in (3, 3, 4))
    assert torch.equal(torch.rand(4), expected)
    for (name, p), q, r in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.any() and "norm" not in name:
            assert not torch.equal(p, r)


@KINDS
def test_in_a_bf16_model_weights_and_products_are_bf16_average_and_state_fp32(kind: str) -> None:
    head = randomized(make_head(kind, horizons=3, ema="teacher"))
    before = {name: x.clone() for name, x in head.state_dict().items()}
    head = nn.ModuleDict({"flow_head": head}).bfloat16()["flow_head"]
    for name, x in head.state_dict().items():
        assert x.dtype == (torch.bfloat16 if name.startswith("net.") else torch.float32)
        assert torch.equal(x, before[name].to(x.dtype))  # rounded only once
    head.net.float()
    seen: set[torch.dtype] = set()
    for module in head.net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    x_t, t, h, horizon = inputs()
    exact = head(x_t, t, h, horizon)
    assert exact.dtype == torch.float32
    assert seen == {torch.float32}
    seen.clear()
    rounded = head(x_t, t, h.bfloat16(), horizon)
    assert seen == {torch.bfloat16}
    # bf16 keeps 8 bits; several products and norms leave an error of a few percent of the output.
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
    head.net.bfloat16()
    same = head(x_t, t, h.bfloat16(), horizon)
    assert (same.float() - exact).norm() < 0.05 * exact.norm()


def test_double_works() -> None:
    assert {x.dtype for x in make_head(horizons=2).double().state_dict().values()} == {torch.float64}


def test_P11_decay_0_equals_no_averaging_bit_for_bit() -> None:
    head = randomized(make_head(ema="teacher", decay=0.0))
    randomized(head.net, seed=6)
    before = [p.clone() for p in head.net.parameters()]
    head.average(first=False)
    for p, mean, old in zip(head.net.parameters(), head.ema.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(mean, old)


def test_P11_the_average_starts_as_the_head_and_follows_its_recursion() -> None:
    head, decay = make_head(ema="teacher", decay=0.75), 0.75
    randomized(head.ema, seed=99)  # the first update must overwrite this
    mean: list[torch.Tensor] = []
    for step in range(4):
        for i, p in enumerate(head.net.parameters()):  # an optimizer step
            with torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)))
        stands = [p.double() for p in head.net.parameters()]
        mean = stands if step == 0 else [decay * m + (1 - decay) * p for m, p in zip(mean, stands, strict=True)]
        head.average(first=step == 0)
        for p, actual, m, old in zip(head.net.parameters(), head.ema.parameters(), mean, stands, strict=True):
            torch.testing.assert_close(actual.double(), m, rtol=1e-5, atol=1e-6)
            assert torch.equal(p, old.float())
            if step == 0:
                assert torch.equal(actual, old.float())


def test_P11_the_average_is_used_on_request_and_gets_no_gradient() -> None:
    head = randomized(make_head(ema="teacher"))
    randomized(head.ema, seed=8)
    x_t, t, h, horizon = inputs()
    net, mean = head(x_t, t, h, horizon), head(x_t, t, h.requires_grad_(), horizon, averaged=True)
    assert not torch.equal(net, mean)
    mean.sum().backward()
    assert h.grad.any()
    assert all(p.grad is None for p in head.parameters())
    assert not any(p.requires_grad for p in head.ema.parameters())


def test_a_head_without_a_network_has_no_parameters_but_a_state() -> None:
    head = make_head(has_network=False, ema="teacher", gate_bins=8, weight=0.3)
    assert list(head.parameters()) == []
    assert head.net is None
    assert head.ema is None
    assert head.state.weight.item() == pytest.approx(0.3)
    assert head.state.baseline.shape == (8,)


def test_the_state_starts_with_the_stores_statistics() -> None:
    mean, std = np.arange(D) / D, np.arange(1, D + 1) / D
    state = make_head(statistics=(mean, std)).state
    np.testing.assert_allclose(state.target_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.target_std, std, rtol=1e-6)
    start = make_head().state
    assert not start.target_mean.any()
    np.testing.assert_allclose(start.target_std, D**-0.5, rtol=1e-6)


def test_only_a_fresh_head_may_be_missing_and_only_once() -> None:
    head = make_head(fresh=True, ema="teacher")
    before = {name: x.clone() for name, x in head.state_dict().items()}
    assert head.sharded_state_dict() == {}
    head.load_state_dict({}, strict=True)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.input_x\.weight"):
        head.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        make_head().load_state_dict({}, strict=True)


def test_a_saved_head_is_loaded_exactly() -> None:
    one, other = randomized(make_head(ema="teacher", seed=1)), make_head(ema="teacher", seed=2)
    one.state.ratio.fill_(0.25)
    other.load_state_dict(one.state_dict())
    for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_impossible_options_are_refused() -> None:
    for wrong in ({"width": 0}, {"depth": -1}, {"ema_decay": 1.0}, {"layer": 0}):
        with pytest.raises(ValueError, match=r"^`"):
            FlowHeadOptions(**wrong)
