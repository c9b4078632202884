"""EMA write-back (sfr_ema = smooth): after each step the head's weights are replaced by their EMA, as in SFR's code.

With ema <- a ema + (1 - a) head and head <- ema after every step, both are equal before the next step. The write-back
is therefore head <- head_before + (1 - a) (head_after - head_before) and needs a copy only during a step. It acts on
the optimizer's fp32 weights, sharded or not, before upstream copies them to the model.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from megatron_sfr.model.flow_head import FlowHead


class Smoothing:
    """Hooks into every optimizer of the process; while `active`, writes back the weights of the head."""

    def __init__(self, head: FlowHead, decay: float) -> None:
        self.decay, self.active = decay, False
        self._head = weakref.ref(head)
        self._before: list[tuple[Tensor, Tensor]] = []
        for register, hook in (
            (register_optimizer_step_pre_hook, self._remember),
            (register_optimizer_step_post_hook, self._write_back),
        ):
            weakref.finalize(head, register(hook).remove)

    def _remember(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._before = [(p, p.detach().clone()) for p in self._mine(optimizer)] if self.active else []

    @torch.no_grad()
    def _write_back(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for p, before in self._before:
            p.lerp_(before, self.decay)
        self._before = []

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The optimizer's tensors that are weights of the head, their fp32 copies, or this rank's shards of either."""
        if (head := self._head()) is None:
            return []
        weights = list(head.parameters())
        copies = {id(copy) for p in weights if (copy := getattr(p, "main_param", None)) is not None}
        spans = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in weights]
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        return [p for p in everything if id(p) in copies or any(a <= p.data_ptr() < b for a, b in spans)]
