"""The EMA write-back equals a stored EMA, whichever tensors the optimizer holds."""

import gc

import pytest
import torch
from torch import Tensor, nn

from megatron_sfr.model.flow_head import FlowHead
from megatron_sfr.training.ema_write_back import Smoothing
from tests.model.heads import make_head, randomised

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
    return [nn.Parameter(p.detach().view(-1)[p.numel() // 2 :]) for p in weights]


@pytest.mark.parametrize("kind", ["weights", "copies", "shards"])
def test_P11_writing_back_follows_the_recursion_of_the_average(kind: str) -> None:
    head, other = randomised(make_head()), nn.Linear(3, 2)
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


def test_P11_decay_0_equals_no_smoothing_bit_for_bit() -> None:
    actual = []
    for decay in (None, 0.0):
        head = randomised(make_head())
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
