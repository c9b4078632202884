"""EMA write-back (sfr_ema = smooth): the head's weights are replaced by their EMA, after or before each step.

After the optimizer's step (ours): ema <- a ema + (1 - a) head and head <- ema leave both equal before the next step, so
the write-back is head <- head_before + (1 - a) (head_after - head_before) and needs a copy only during a step.
Before it (SFR's code): head <- ema, then the step. The loss sees the EMA plus one whole step, and the EMA has to be
kept; it is `head.ema`, which `FlowTerm.begin` updates from the weights that the step's loss sees.
Both act on the optimizer's fp32 weights, sharded or not, before upstream copies them to the model.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from megatron_sfr.model.flow_head import FlowHead


class Smoothing:
    """Hooks into every optimizer of the process; while `active`, writes back the weights of the head."""

    def __init__(self, head: FlowHead, decay: float, *, before_step: bool = False) -> None:
        self.decay, self.before_step, self.active = decay, before_step, False
        self._head = weakref.ref(head)
        self._before: list[tuple[Tensor, Tensor]] = []
        for register, hook in (
            (register_optimizer_step_pre_hook, self._prepare),
            (register_optimizer_step_post_hook, self._write_back),
        ):
            weakref.finalize(head, register(hook).remove)

    @torch.no_grad()
    def _prepare(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Before the step: writes the EMA into the weights, or remembers the weights."""
        self._before = []
        if not self.active:
            return
        for p, weight, ema in self._mine(optimizer):
            if not self.before_step:
                self._before.append((p, p.detach().clone()))
                continue
            assert ema is not None
            start = first_element(p, weight)
            p.copy_(ema.flatten()[start : start + p.numel()].view_as(p))

    @torch.no_grad()
    def _write_back(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for p, before in self._before:
            p.lerp_(before, self.decay)
        self._before = []

    def _mine(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The optimizer's tensors that are weights of the head, their fp32 copies, or this rank's shards of either.

        Each with the weight and, if the head keeps one, its EMA.
        """
        if (head := self._head()) is None or head.net is None:
            return
        weights = list(head.net.parameters())
        averages = list(head.ema.parameters()) if head.ema is not None else [None] * len(weights)
        copies = {id(copy): i for i, p in enumerate(weights) if (copy := getattr(p, "main_param", None)) is not None}
        spans = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in weights]
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            held = (i for i, (start, end) in enumerate(spans) if start <= p.data_ptr() < end)
            if (i := copies.get(id(p), next(held, None))) is not None:
                yield p, weights[i], averages[i]


def first_element(p: Tensor, weight: Tensor) -> int:
    """Index in the flattened weight of the first element of p: the weight itself, its copy, or a shard of either.

    The shard of a copy has separate memory. megatron-core 0.19.2 gives it a view of the weight's gradient, if that is
    fp32, and the view tells where the shard starts. ValueError if it is not.
    """
    if p.numel() == weight.numel():
        return 0
    pairs = [(p, weight), (p.grad, getattr(weight, "main_grad", None))]
    for part, whole in pairs:
        if part is not None and whole is not None and part.dtype == whole.dtype:
            offset = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
            if 0 <= offset < whole.numel():
                return offset
    raise ValueError(
        "sfr_ema_order = before_step cannot tell which part of the head this rank's optimizer holds: set "
        "accumulate_allreduce_grads_in_fp32, or sfr_ema_order to after_step"
    )
