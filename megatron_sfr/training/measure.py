"""How strongly SFR pulls at the hidden states h: its gradient norm there against cross-entropy's, and how much of it
is signal. Everything is summed over the global batch inside the forward pass, so the result is the same on any layout
and is in the checkpoint of the step that measured it.

Letters: S positions (this rank's, under sequence parallelism), B samples, H hidden size, V columns of the shard.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sfr.model.flow_head import Measured
from megatron_sfr.objectives.cross_entropy import logit_gradient
from megatron_sfr.objectives.vocab import Vocab
from megatron_sfr.runtime.parallel import sum_over_data, sum_over_tensor, tensor_group, tensor_rank

SMOOTHING = 0.5  # weight of a new measurement in the steered weight, in the log domain
LARGEST_CHANGE = 100.0  # the steered weight stays within this factor of --sfr-weight


def cross_entropy_power(logits_SBV: Tensor, labels_BS: Tensor, mask_BS: Tensor, weight_VH: Tensor) -> Tensor:
    """Squared norm over all positions of the gradient of sum(mask * CE) at h, computed apart from autograd."""
    labels_T, mask_T = labels_BS.t().reshape(-1), mask_BS.t().reshape(-1)
    z_TV = logits_SBV.flatten(0, 1)
    vocab = Vocab(start=tensor_rank() * z_TV.shape[-1], group=tensor_group())
    g_TV = logit_gradient(z_TV, labels_T, mask_T, vocab)
    return sum_over_tensor(g_TV.to(weight_VH.dtype) @ weight_VH.detach()).float().square().sum()


def flow_powers(losses: tuple[Callable[[Tensor], Tensor], ...], h_SBH: Tensor, sharded: bool) -> Tensor:
    """[|g_1|^2, |g_2|^2, g_1 . g_2] for the gradients at h of two losses that differ in their noise alone."""
    gradients = []
    with torch.enable_grad():
        for loss in losses:
            h = h_SBH.detach().requires_grad_()
            gradients.append(torch.autograd.grad(loss(h), h)[0].float())
    g_1, g_2 = gradients
    powers = torch.stack([g_1.square().sum(), g_2.square().sum(), (g_1 * g_2).sum()])
    return sum_over_tensor(powers) if sharded else powers


class GradientMeasurement:
    """Adds up the microbatches of a measured step; after the last one, writes the result into the head's buffers."""

    def __init__(self, target_ratio: float, base_weight: float) -> None:
        self.target_ratio, self.base_weight = target_ratio, base_weight
        self.step, self.seen = -1, 0
        self.total: Tensor | None = None

    def add(self, step: int, microbatches: int, powers: Tensor, measured: Measured) -> None:
        """powers: [|g_CE|^2, |g_1|^2, |g_2|^2, g_1 . g_2] of one microbatch, equal on all tensor-parallel ranks."""
        if step != self.step:
            self.step, self.seen, self.total = step, 0, torch.zeros_like(powers)
        assert self.total is not None
        self.total, self.seen = self.total + powers, self.seen + 1
        if self.seen == microbatches:
            self._finish(sum_over_data(self.total), measured)

    def _finish(self, total: Tensor, measured: Measured) -> None:
        cross_entropy, g_1, g_2, dot = total.unbind()
        ratio = (g_1 / cross_entropy).sqrt()
        # <g_1, g_2> estimates the power of the expectation; the rest of |g|^2 averages out over noise draws.
        signal = (dot / (g_1 * g_2).sqrt()).clamp(0.0, 1.0)
        wanted = self.target_ratio / ratio
        first = measured.ratio == 0
        weight = torch.where(first, wanted, measured.weight ** (1 - SMOOTHING) * wanted**SMOOTHING)
        low, high = self.base_weight / LARGEST_CHANGE, self.base_weight * LARGEST_CHANGE
        # A head that still answers 0 pulls at nothing: there is no ratio yet, and what is there stays.
        found = {"weight": weight.clamp(low, high), "ratio": ratio, "signal": signal}
        for name, value in found.items():
            buffer = getattr(measured, name)
            buffer.copy_(torch.where((g_1 > 0) & (cross_entropy > 0), value, buffer))
