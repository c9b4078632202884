"""The EMA write-back equals a stored EMA, whichever tensors the optimizer holds and whichever comes first."""

import gc

import pytest
import torch
from torch import Tensor, nn

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.ema_write_back import Smoothing, first_element
from tests.model.heads import inputs, make_head, randomized

DECAY = 0.75


def optimized(head: FlowHead, kind: str) -> list[Tensor]:
    """The tensors of Megatron's optimizers: the weights, fp32 copies of them, or slices of flat shards."""
    weights = list(head.net.parameters())
    if kind == "weights":
        return weights
    if kind == "copies":
        for p in weights:
            p.main_param = nn.Parameter(p.detach().clone())
        return [p.main_param for p in weights]
    shards = [nn.Parameter(p.detach().view(-1)[p.numel() // 2 :]) for p in weights]
    if kind == "shards":
        return shards
    for p, shard in zip(weights, shards, strict=True):
        p.main_param = nn.Parameter(shard.detach().clone())
    return [p.main_param for p in weights]


@pytest.mark.parametrize("kind", ["weights", "copies", "shards"])
def test_P11_writing_back_follows_the_recursion_of_the_average(kind: str) -> None:
    head, other = randomized(make_head()), nn.Linear(3, 2)
    params = optimized(head, kind)
    smoothing, optimizer = Smoothing(head, DECAY), torch.optim.Adam([*params, *other.parameters()], 0.1)
    reference = [nn.Parameter(p.detach().clone()) for p in params]  # the same with a stored EMA
    plain = torch.optim.Adam(reference, 0.1)
    average: list[Tensor] = []
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, reference, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad = p.grad.clone()
        for p in other.parameters():
            p.grad = torch.ones_like(p)
        smoothing.active = step >= 2
        average = average or ([q.detach().clone() for q in reference] if step == 2 else [])
        before = [p.detach().clone() for p in other.parameters()]
        optimizer.step()
        plain.step()
        if step >= 2:
            with torch.no_grad():
                for q, mean in zip(reference, average, strict=True):
                    mean.copy_(DECAY * mean + (1 - DECAY) * q)
                    q.copy_(mean)
        for p, q in zip(params, reference, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert all(
            (p - q).abs().min() > 0.05 for p, q in zip(other.parameters(), before, strict=True)
        )  # other weights train normally


def before_step(head: FlowHead, **changes: object) -> FlowTerm:
    """A term whose `begin` and write-back act on this head."""
    options = FlowHeadOptions(ema="smooth", ema_order="before_step", ema_decay=DECAY, **changes)
    return FlowTerm(TermOptions(SFROptions(), TargetOptions(), GateOptions(), options))


def weights_of(head: FlowHead) -> list[Tensor]:
    return [p.detach().clone() for p in head.net.parameters()]


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    return [torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) for i, p in enumerate(params)]


@pytest.mark.parametrize("kind", ["weights", "copies", "shards", "shards of copies"])
@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("phase_a", [0, 2])
def test_P11_before_the_step_follows_the_authors_recursion(kind: str, fault: bool, phase_a: int) -> None:
    """theirs <- EMA of what the loss saw, then the step; with the fault the EMA starts from the initial head."""
    head = randomized(make_head(ema="smooth", order="before_step"))
    for p, mean in zip(head.net.parameters(), head.ema.parameters(), strict=True):
        mean.data.copy_(p)
    term, weights = before_step(head, fault_phase_a_lost=fault), list(head.net.parameters())
    spans = [(p.numel() // 2 if "shards" in kind and p.numel() > 1 else 0, p.numel()) for p in weights]
    held = optimized(head, kind)
    theirs = [nn.Parameter(p.detach().clone()) for p in weights]
    average = weights_of(head)  # their code copies the head at the start of the run
    optimizer, plain = torch.optim.SGD(held, 0.1), torch.optim.SGD(theirs, 0.1)
    for step in range(5):
        term.begin(head, step, phase_a)
        for (start, end), p, w, q, g in zip(spans, held, weights, theirs, gradients(theirs, step), strict=True):
            q.grad = g
            w.main_grad = g.clone()
            p.grad = w.main_grad.view(-1)[start:end].view_as(p)
        if step >= phase_a:
            with torch.no_grad():
                for q, mean in zip(theirs, average, strict=True):
                    keep = 0.0 if step == phase_a and not fault else DECAY
                    mean.copy_(keep * mean + (1 - keep) * q)
                    q.copy_(mean)
        optimizer.step()
        plain.step()
        for (start, end), p, w, q in zip(spans, held, weights, theirs, strict=True):
            torch.testing.assert_close(p.view(-1), q.detach().view(-1)[start:end], rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                w.copy_(q)  # as upstream's copy and all-gather of the weights


def test_a_shard_that_cannot_be_placed_is_an_error() -> None:
    weight, shard = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(3))
    weight.main_grad, shard.grad = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(3)
    with pytest.raises(ValueError, match="accumulate_allreduce_grads_in_fp32"):
        first_element(shard, weight)


def regression(order: str, phase_a: int, *, fault: bool = False) -> list[float]:
    """The loss that each step sees, of a head that learns one vector by Adam."""
    torch.manual_seed(0)
    head = make_head(ema="smooth", order=order, decay=0.999)
    options = FlowHeadOptions(ema="smooth", ema_order=order, fault_phase_a_lost=fault)
    term = FlowTerm(TermOptions(SFROptions(), TargetOptions(), GateOptions(), options))
    optimizer = torch.optim.Adam(head.net.parameters(), 5e-3)
    x_t, t, h, horizon = (x[:1, :1, :1] if x.dim() == 4 else x[:1, :1] for x in inputs())
    losses = []
    for step in range(2 * phase_a + 3 if phase_a else 60):
        term.begin(head, step, phase_a)
        optimizer.zero_grad()
        loss = (head(x_t, t, h, horizon) - 0.25).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_the_fault_loses_what_phase_a_has_learnt() -> None:
    n = 60
    ours, theirs, faulty = (
        regression("after_step", n),
        regression("before_step", n),
        regression("before_step", n, fault=True),
    )
    assert ours[0] == pytest.approx(0.0625)
    assert ours[:n] == theirs[:n] == faulty[:n]  # no EMA in phase A
    assert ours[n] < 1e-3
    assert max(ours[n:]) < 2e-3
    assert max(theirs[n:]) < 2e-3
    assert faulty[n] == ours[n]  # the first joint step still sees the trained head
    assert faulty[n + 1] > 0.05  # and overwrites it


def test_without_phase_a_their_loss_sees_one_whole_step() -> None:
    ours, theirs = regression("after_step", 0), regression("before_step", 0)
    assert ours[0] == theirs[0] == pytest.approx(0.0625)
    first_of_ours, first_of_theirs = ours[0] - ours[1], theirs[0] - theirs[1]
    assert 0 < first_of_ours < 0.01 * first_of_theirs
    assert theirs[1] - theirs[-1] < first_of_theirs  # and 58 more add less than that one


def test_P11_decay_0_equals_no_smoothing_bit_for_bit() -> None:
    actual = []
    for decay in (None, 0.0):
        head = randomized(make_head())
        smoothing = Smoothing(head, decay) if decay is not None else None
        if smoothing is not None:
            smoothing.active = True
        optimizer = torch.optim.Adam(head.net.parameters(), 0.1)
        for p in head.net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        actual.append([p.detach().clone() for p in head.net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*actual, strict=True))


def test_the_hooks_are_removed_with_the_head() -> None:
    from torch.optim import optimizer

    hooks = optimizer._global_optimizer_pre_hooks
    before = len(hooks)
    head = make_head()
    smoothing = Smoothing(head, DECAY)
    assert len(hooks) == before + 1
    del head
    gc.collect()
    assert len(hooks) == before
    assert not smoothing._before
