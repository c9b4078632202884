"""SFR's gradient norm at the hidden states h relative to the token objective's, and its noise-free share.

Everything is summed over the global batch during the forward pass, so the result is the same on any parallel layout and
is part of the checkpoint of the measured step.
Shapes: S positions (this rank's, under sequence parallelism), B samples, H hidden size, T = S B tokens, V columns of
the shard.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.model.state import FlowState
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.token_loss import logit_gradient
from megatron_sfr.runtime.parallel import sum_over_tensor
from megatron_sfr.training.auxiliary_loss import StepSums

SMOOTHING = 0.5  # weight of a new measurement in the adaptive weight, in the log domain
LARGEST_CHANGE = 10_000.0  # the adaptive weight stays within this factor of --sfr-weight


def token_power(z_TV: Tensor, y_T: Tensor, objective: TokenLoss, vocab: Vocab, weight_VH: Tensor) -> Tensor:
    """Squared norm of the gradient at h of the summed token objective, over all positions; without autograd."""
    g_TV = logit_gradient(z_TV, y_T, objective, vocab)
    return sum_over_tensor(g_TV.to(weight_VH.dtype) @ weight_VH.detach()).float().square().sum()


def flow_powers(losses: tuple[Callable[[Tensor], Tensor], ...], h_SBH: Tensor, sharded: bool) -> Tensor:
    """[|g_1|^2, |g_2|^2, g_1 . g_2] of the gradients at h of two losses that differ only in their noise."""
    gradients = []
    with torch.enable_grad():
        for loss in losses:
            h = h_SBH.detach().requires_grad_()
            gradients.append(torch.autograd.grad(loss(h), h)[0].float())
    g_1, g_2 = gradients
    powers = torch.stack([g_1.square().sum(), g_2.square().sum(), (g_1 * g_2).sum()])
    return sum_over_tensor(powers) if sharded else powers


class GradientMeasurement:
    """Sums over the microbatches of a measured step; after the last one, writes the result to the head's state."""

    def __init__(self, target_ratio: float, base_weight: float) -> None:
        self.target_ratio, self.base_weight = target_ratio, base_weight
        self.sums = StepSums()

    def add(
        self, step: int, microbatches: int, powers: Tensor, state: FlowState, *, restart: bool = False
    ) -> Tensor | None:
        """Adds one microbatch; after the last one of the step, updates the state.

        Args:
            powers: [|g_token|^2, |g_1|^2, |g_2|^2, g_1 . g_2] of one microbatch, equal on all tensor-parallel ranks.
            restart: whether to use this measurement's weight without averaging it with earlier ones.
        Returns:
            None before the last microbatch; then whether the weight is at its bound, as a tensor [1].
        """
        if (total := self.sums.add(step, microbatches, powers)) is None:
            return None
        return self._finish(total, state, restart)

    def _finish(self, total: Tensor, state: FlowState, restart: bool) -> Tensor:
        token, g_1, g_2, dot = total.unbind()
        ratio = (g_1 / token).sqrt()
        # <g_1, g_2> estimates the squared norm of the expected gradient; the rest of |g|^2 is noise.
        signal = (dot / (g_1 * g_2).sqrt()).clamp(0.0, 1.0)
        target = self.target_ratio / ratio
        averaged = state.weight ** (1 - SMOOTHING) * target**SMOOTHING
        weight = torch.where((state.ratio == 0) | restart, target, averaged)
        low, high = self.base_weight / LARGEST_CHANGE, self.base_weight * LARGEST_CHANGE
        # A head that still predicts 0 has no gradient at h. The ratio is then undefined and the state does not change.
        measured = (g_1 > 0) & (token > 0)
        values = {"weight": weight.clamp(low, high), "ratio": ratio, "signal": signal}
        for name, value in values.items():
            buffer = getattr(state, name)
            buffer.copy_(torch.where(measured, value, buffer))
        return measured & ((weight <= low) | (weight >= high))


def at_bound(step: int, weight: float, target_ratio: float) -> str:
    """The log line for an adaptive weight that has reached its bound."""
    return (
        f"SFR's adaptive weight is at its bound, {weight:g} (step {step + 1}): its gradient at the hidden states does "
        f"not reach sfr_grad_ratio = {target_ratio:g}. Train the head longer in phase A (sfr_warmup_steps), or change "
        f"sfr_weight: the bound is a factor of {LARGEST_CHANGE:,.0f} from it."
    )
