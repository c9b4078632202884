"""The auxiliary loss of a microbatch: where its gradients go, and how its state changes over steps."""

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, scale_targets
from megatron_sfr.runtime.parallel import scale_gradient
from megatron_sfr.training.auxiliary_loss import FlowTerm, Term, TermOptions
from megatron_sfr.training.gradient_ratio import GradientMeasurement, flow_powers

pytestmark = pytest.mark.usefixtures("one_rank")

S, B, H, D, R = 7, 2, 8, 5, 3


def make(**options: object) -> tuple[FlowTerm, FlowHead]:
    """The auxiliary loss and a head with random parameters."""
    kinds = (SFROptions, TargetOptions, GateOptions, FlowHeadOptions)
    parts = [kind(**{k: v for k, v in options.items() if k in kind.__dataclass_fields__}) for kind in kinds]
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, cuda_graph_modules=[])
    network = options.get("loss") != "cka"
    bins = parts[2].bins
    head = FlowHead(config, FlowHeadPlan(parts[3], dim=D, has_network=network, gate_bins=bins))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return FlowTerm(TermOptions(*parts)), head


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    position = torch.tensor([[0, 2, 3, 4, 5, 0], [1, 2, 4, 5, 6, 6]])
    return {
        "anchor_position": position,
        "anchor_place": position,
        "anchor_sample": torch.tensor([[4], [9]]).expand(-1, 6),
        "anchor_horizon": torch.zeros(B, 6, dtype=torch.int64),
        "anchor_weight": torch.tensor([[1.0, 2, 1, 1, 1, 0], [3, 2, 1, 1, 0, 0]]),
        "anchor_row": torch.tensor([[0, 1, 1, 2, 2, 0], [0, 1, 2, 2, 0, 0]]),
        "target": torch.nn.functional.normalize(torch.randn(B, R, D, generator=g), dim=-1).half(),
    }


def states() -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(1)).requires_grad_()


def step(term: FlowTerm, head: FlowHead, h: Tensor, number: int = 0, *, detach: bool = False, first: int = 0) -> Term:
    """One step of one microbatch, including the backward pass."""
    start = term.begin(head, number, first)
    actual = term(head, make_batch(number), h, start, detach=detach, sharded=False, microbatches=1)
    if actual.objective.requires_grad:
        actual.objective.backward()
    return actual


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka"])
def test_every_loss_has_gradients_exactly_at_anchors_of_positive_weight(loss: str) -> None:
    term, head = make(loss=loss)
    h = states()
    actual = step(term, head, h)
    touched = {(s, b) for s, b in h.grad.abs().sum(-1).nonzero().tolist()}
    assert touched == {(s, 0) for s in (0, 2, 3, 4, 5)} | {(s, 1) for s in (1, 2, 4, 5)}
    assert actual.weight.item() == 13
    assert all(p.grad is not None for p in head.parameters() if loss == "flow")


@pytest.mark.parametrize("options", [{}, {"ema": "teacher"}, {"loss": "cosine"}, {"kind": "static"}])
def test_the_weight_multiplies_only_the_gradient_at_h(options: dict[str, object]) -> None:
    gradients = []
    for weight in (1.0, 3.0, torch.tensor([3.0])):
        term, head = make(**options)
        h = states()
        start = term.begin(head, 0, 100)
        loss = term(head, make_batch(), h, start, detach=False, sharded=False, microbatches=1, weight_at_h=weight)
        loss.objective.backward()
        gradients.append((h.grad, [p.grad for p in head.net.parameters()]))
    (h_1, net_1), *others = gradients
    for h_3, net_3 in others:
        torch.testing.assert_close(h_3, 3 * h_1)
        assert all(torch.equal(a, b) for a, b in zip(net_1, net_3, strict=True))


def test_at_weight_0_even_an_infinite_gradient_is_0() -> None:
    for factor in (0.0, torch.zeros(1)):
        x = torch.ones(3, requires_grad=True)
        (scale_gradient(x, factor) * torch.tensor([1.0, float("inf"), float("nan")])).sum().backward()
        assert torch.equal(x.grad, torch.zeros(3))


@pytest.mark.parametrize("ema", ["none", "smooth", "teacher"])
def test_with_detached_states_only_the_head_has_a_gradient(ema: str) -> None:
    term, head = make(ema=ema)
    h = states()
    step(term, head, h, detach=True, first=100)
    assert h.grad is None
    assert all(p.grad.any() for p in head.net.parameters())


def test_the_ema_supplies_the_backbones_gradient_and_the_student_the_heads() -> None:
    term, head = make(ema="teacher")  # network and EMA have different random weights
    plain, alone = make()
    h, own = states(), states()
    actual, expected = step(term, head, h, first=100), step(plain, alone, own)
    assert torch.equal(actual.loss, expected.loss)  # the student's loss is logged
    for p, q in zip(head.net.parameters(), alone.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(p.grad is None for p in head.ema.parameters())
    assert not torch.allclose(h.grad, own.grad)
    for p, mean in zip(alone.net.parameters(), head.ema.parameters(), strict=True):
        p.data.copy_(mean)
    taught = states()
    step(plain, alone, taught, number=0)
    torch.testing.assert_close(h.grad, taught.grad)


def test_P11_the_average_starts_after_phase_a_and_is_updated_once_per_step() -> None:
    term, head = make(ema="teacher", ema_decay=0.5)
    start = [p.clone() for p in head.ema.parameters()]

    def learn() -> list[Tensor]:
        with torch.no_grad():
            for p in head.net.parameters():
                p.add_(1.0)
        return [p.clone() for p in head.net.parameters()]

    for number in (0, 1):  # phase A
        term.begin(head, number, 2)
        assert all(torch.equal(a, b) for a, b in zip(start, head.ema.parameters(), strict=True))
        before = learn()
    term.begin(head, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, head.ema.parameters(), strict=True))
    for p, mean in zip(head.net.parameters(), head.ema.parameters(), strict=True):
        assert torch.equal(p, mean)  # starts from the weights at the end of phase A
    learned = learn()
    for _ in range(3):  # three microbatches of one step
        term.begin(head, 3, 2)
    for p, mean, old, new in zip(head.net.parameters(), head.ema.parameters(), before, learned, strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
        assert torch.equal(p, new)
    head.eval()
    term.begin(head, 4, 2)
    for mean, old, new in zip(head.ema.parameters(), before, learned, strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)


@pytest.mark.parametrize("scale", ["l2", "sqrt_d", "whiten"])
def test_P11_targets_do_not_depend_on_the_average_or_the_head(scale: str) -> None:
    actual = []
    for ema in ("none", "smooth", "teacher"):
        term, head = make(ema=ema, scale=scale)
        for number in range(3):
            step(term, head, states(), number)
            with torch.no_grad():
                for p in head.parameters():
                    p.mul_(1.5)
        actual.append(term.anchors(head, make_batch(3), sharded=False)[0].x_1_BAD)
    assert torch.equal(actual[0], actual[1])
    assert torch.equal(actual[0], actual[2])
    assert not actual[0].requires_grad
    batch, mean, std = make_batch(3), torch.zeros(D), torch.full((D,), D**-0.5)
    expected = scale_targets(batch["target"], mean, std, TargetOptions(scale=scale))
    for b in range(B):
        assert torch.equal(actual[0][b], expected[b, batch["anchor_row"][b]])


def test_a_closed_gate_stops_only_the_gradient_at_h() -> None:
    open_term, head = make(kind="static", threshold=1e9, bins=4)
    h = states()
    first = step(open_term, head, h, 0)
    assert h.grad.any()
    assert head.state.gate.item() == 0  # closed from the next step on
    assert head.state.baseline.any()
    head.zero_grad()
    h.grad = None
    second = step(open_term, head, h, 1)
    assert not h.grad.any()
    assert all(p.grad.any() for p in head.net.parameters())
    plain, other = make()
    torch.testing.assert_close(step(plain, other, states(), 1).loss, second.loss)
    assert first.loss != second.loss


def test_running_whitening_statistics_change_after_a_steps_last_microbatch() -> None:
    term, head = make(scale="whiten", whiten="ema", whiten_decay=0.5)
    initial = head.state.target_mean.clone()
    seen, weights = [], []
    for seed in (0, 1):
        assert torch.equal(head.state.target_mean, initial)
        start = term.begin(head, 0, 0)
        batch = make_batch(seed)
        term(head, batch, states(), start, detach=False, sharded=False, microbatches=2)
        for b in range(B):
            seen.append(batch["target"][b, batch["anchor_row"][b]].double())
            weights.append(batch["anchor_weight"][b].double())
    x, w = torch.cat(seen), torch.cat(weights)
    mean = w @ x / w.sum()
    torch.testing.assert_close(head.state.target_mean.double(), mean, rtol=1e-5, atol=1e-6)
    spread = (w @ (x - mean).square() / w.sum()).sqrt()
    torch.testing.assert_close(head.state.target_std.double(), spread, rtol=1e-5, atol=1e-6)
    assert head.state.batches.item() == 1


def test_evaluation_does_not_change_the_state_and_gives_the_same_loss() -> None:
    options = {"kind": "dynamic", "scale": "whiten", "whiten": "ema"}
    term, head = make(**options)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    head.eval()
    with torch.no_grad():
        actual = step(term, head, states())
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    term, head = make(**options)
    assert torch.equal(step(term, head, states()).loss.detach(), actual.loss)


def test_the_two_measured_losses_differ_only_in_their_noise() -> None:
    for loss, equal in (("flow", False), ("mse", True), ("cosine", True)):
        term, head = make(loss=loss)
        h = states().detach()
        start = term.begin(head, 0, 0)
        one, other = (f(h) for f in term.losses(head, make_batch(), sharded=False, detach=False))
        assert torch.equal(one, other) == equal
        assert torch.equal(one, term(head, make_batch(), h, start, detach=True, sharded=False, microbatches=1).loss)


class AsOnCuda(TorchDispatchMode):
    """Refuses operations for which CUDA's host waits for the device, and those that add in another order in each run.

    A run on CUDA would be slower, or not repeat itself; on a CPU neither shows.
    """

    WAITING = frozenset(
        {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
    )
    UNORDERED = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "bincount", "histc"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING | self.UNORDERED, name
        if name.startswith(("index", "_index_put")):  # a mask as an index becomes nonzero
            assert not any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "dynamic", "time": "logit_normal"},
        {"kind": "static", "ema": "teacher", "mean": "microbatch"},
        {"scale": "whiten", "whiten": "ema", "architecture": "adaln"},
        {"loss": "cka"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_step_on_cuda_never_waits_and_repeats_itself(options: dict[str, object]) -> None:
    term, head = make(**options)
    batch, h = make_batch() | {"loss_mask": torch.ones(B, S)}, states()
    measurement = GradientMeasurement(0.1, 1.0)
    with AsOnCuda():
        for number in range(2):
            start = term.begin(head, number, 0)
            given = {"detach": False, "sharded": False, "microbatches": 1, "weight_at_h": start.weight}
            term(head, batch, h, start, **given).objective.backward()
            powers = flow_powers(term.losses(head, batch, False, False), h, False)
            measurement.add(number, 1, torch.cat([powers[:1], powers]), head.state)
    assert h.grad.abs().sum() > 0
