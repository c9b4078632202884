"""The auxiliary loss of one microbatch, from the anchors' hidden states and targets.

Shapes: S positions (this rank's, under sequence parallelism), B samples, H hidden size, A anchors, K noise draws,
D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions
from megatron_sfr.model.state import StepStart
from megatron_sfr.objectives.sfr.gate import GateOptions, decide, sums_by_time
from megatron_sfr.objectives.sfr.sfr_loss import (
    SFROptions,
    anchor_errors,
    draw_noise,
    mean_over_microbatch,
    weighted_sum,
)
from megatron_sfr.objectives.sfr.target_scale import TargetOptions, batch_moments, running_statistics, scale_targets
from megatron_sfr.runtime.parallel import (
    context_size,
    scale_gradient,
    spread_rows,
    sum_over_context,
    sum_over_data,
    sum_over_tensor,
    sum_parts,
    sum_parts_over_context,
    tensor_rank,
    tensor_size,
)
from megatron_sfr.training.ema_write_back import Smoothing

Batch = dict[str, Tensor]
TARGETS = "sfr: targets"
"""The range of the targets in a profiler's trace: their selection and scale, and the wait for online ones."""
DATASET_BITS = 36  # sample numbers of one dataset are below 2^36, those of the noise below 2^48


@dataclass(frozen=True)
class TermOptions:
    """Options of the auxiliary loss, except its weight.

    Example:
        >>> import megatron_sfr as sfr
        >>> options = sfr.TermOptions(sfr=sfr.SFROptions(draws=4), head=sfr.FlowHeadOptions(width=512))
        >>> options.gate.kind
        'none'
    """

    sfr: SFROptions = field(default_factory=SFROptions)
    """The error that is minimized, and its noise."""
    targets: TargetOptions = field(default_factory=TargetOptions)
    """The scale of the target embeddings."""
    gate: GateOptions = field(default_factory=GateOptions)
    """When a step has no gradient at the backbone."""
    head: FlowHeadOptions = field(default_factory=FlowHeadOptions)
    """The velocity network."""


class Anchors(NamedTuple):
    """The anchors that this rank processes; padding has weight 0."""

    position_BA: Tensor
    """Position in the sequence."""
    sample_BA: Tensor
    """Number of the sample. It keys the noise, with `place_BA`."""
    place_BA: Tensor
    horizon_BA: Tensor
    weight_BA: Tensor
    x_1_BAD: Tensor


class Term(NamedTuple):
    """Sums over this tensor-parallel group's microbatch."""

    objective: Tensor
    """The loss to differentiate."""
    loss: Tensor
    """The head's loss, for the log."""
    weight: Tensor
    """The sum of weights that divides `loss` in the log."""


class StepSums:
    """Sums tensors over the microbatches of a step and over data-parallel ranks."""

    def __init__(self) -> None:
        self.step, self.seen = -1, 0
        self.total: Tensor | None = None

    def add(self, step: int, microbatches: int, x: Tensor) -> Tensor | None:
        """Adds one microbatch's x, equal on all tensor-parallel ranks. Returns the sum after the last microbatch."""
        total = self.add_local(step, microbatches, x)
        return None if total is None else sum_over_data(total)

    def add_local(self, step: int, microbatches: int, x: Tensor) -> Tensor | None:
        """Adds one microbatch's x. Returns this data-parallel rank's sum after the last microbatch."""
        if step != self.step or self.total is None:
            self.step, self.seen, self.total = step, 0, torch.zeros_like(x)
        self.total, self.seen = self.total + x, self.seen + 1
        return self.total if self.seen == microbatches else None


class FlowTerm:
    """Computes the auxiliary loss. Holds options and partial sums; everything checkpointed is in the head's state."""

    def __init__(self, options: TermOptions) -> None:
        self.options = options
        self.gate_sums, self.target_sums = StepSums(), StepSums()
        self.smoothing: Smoothing | None = None
        self.started: StepStart | None = None
        """The current training step. Megatron does not tell which microbatch is a step's first."""

    def begin(self, head: FlowHead, step: int, first_average: int) -> StepStart:
        """Call before each microbatch.

        A training step's first microbatch also updates the EMA of the head.

        Args:
            step: number of the training step, from 0.
            first_average: first step that updates the EMA.
        Returns: the values that the microbatch uses, equal for all microbatches of a training step.
        """
        if not head.training:
            return head.state.at(step)
        if self.started is None or self.started.step != step:
            self.started = head.state.at(step)
            self._average(head, step, first_average)
        return self.started

    def _average(self, head: FlowHead, step: int, first_average: int) -> None:
        """Updates the EMA of the head's weights, or switches its write-back on."""
        options = self.options.head
        if options.ema == "smooth":
            before_step = options.ema_order == "before_step"
            self.smoothing = self.smoothing or Smoothing(head, options.ema_decay, before_step=before_step)
            self.smoothing.active = step >= first_average
        if head.ema is None or head.net is None or step < first_average:
            return
        x_t, t, h = (head.state.weight.new_zeros(1, 1, 1, n) for n in (head.dim, 1, head.config.hidden_size))
        h = h.to(next(head.net.parameters()).dtype)  # the dtype of the hidden states
        with torch.no_grad():  # calling the head waits for upstream's overlapped all-gather of its weights
            head(x_t, t, h, torch.zeros_like(t[..., 0, 0], dtype=torch.int64))
        head.average(first=step == first_average and not options.fault_phase_a_lost)

    def __call__(
        self,
        head: FlowHead,
        batch: Batch,
        h_SBH: Tensor,
        start: StepStart,
        *,
        detach: bool,
        sharded: bool,
        microbatches: int,
        weight_at_h: Tensor | float = 1.0,
    ) -> Term:
        """The auxiliary loss of one microbatch. In training the step's last microbatch updates gate and statistics.

        Args:
            start: what `begin` returned for this microbatch.
            detach: whether the hidden states are detached, so that only the head learns.
            sharded: whether h holds only this tensor-parallel rank's positions.
            weight_at_h: factor on the gradient that reaches h; the head's own gradient is not scaled.
        """
        anchors, pick = self.anchors(head, batch, sharded)
        teacher = self.options.head.ema == "teacher" and not detach
        gated = self.options.gate.kind != "none"
        weighted_SBH = scale_gradient(h_SBH, weight_at_h * start.gate if gated else weight_at_h)
        student_SBH = h_SBH.detach() if detach or teacher else weighted_SBH
        noise = self._noise(anchors, first_draw=0)
        error, weight, t = self._errors(head, anchors, noise, pick(student_SBH))
        loss = objective = weighted_sum(error, weight)
        if teacher:
            taught = self._errors(head, anchors, noise, pick(weighted_SBH), averaged=True)
            objective = loss + weighted_sum(taught[0], taught[1])
        sums = torch.stack([objective, loss.detach(), weight.sum()])
        split = sharded and self.options.sfr.loss != "cka"
        if head.training and torch.is_grad_enabled():
            if self.options.gate.kind != "none":
                sums_2N = sums_by_time(error, weight, t, len(head.state.baseline))
                self._move_gate(head, sum_over_tensor(sums_2N) if split else sums_2N, start.step, microbatches)
            self._move_statistics(head, batch, start.step, microbatches)
        return Term(*(sum_parts(sums) if split else sums).unbind())

    def losses(
        self, head: FlowHead, batch: Batch, sharded: bool, detach: bool
    ) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Two losses as functions of h that differ only in their noise, with the network that trains the backbone."""
        anchors, pick = self.anchors(head, batch, sharded)
        averaged = self.options.head.ema == "teacher" and not detach

        def loss(first_draw: int, h_SBH: Tensor) -> Tensor:
            noise = self._noise(anchors, first_draw)
            error, weight, _ = self._errors(head, anchors, noise, pick(h_SBH), averaged=averaged)
            return weighted_sum(error, weight)

        return partial(loss, 0), partial(loss, self.options.sfr.draws)

    def anchors(self, head: FlowHead, batch: Batch, sharded: bool) -> tuple[Anchors, Callable[[Tensor], Tensor]]:
        """This rank's anchors, and a function that selects their hidden states [B, A, H] from h [S, B, H].

        Under sequence parallelism each rank processes an equal share of the anchors, wherever their positions are.
        Under context parallelism it processes the anchors at its positions; the others have weight 0. cka compares all
        anchors of a sample and processes all of them on every rank.
        """
        fields = [batch[f"anchor_{name}"] for name in ("position", "sample", "place", "horizon", "weight", "row")]
        sample_B1 = torch.arange(len(fields[0]), device=fields[0].device)[:, None]
        all_anchors = self.options.sfr.loss == "cka"
        n, rank = (tensor_size(), tensor_rank()) if sharded else (1, 0)
        fields = [F.pad(x, (0, -x.shape[1] % n)) for x in fields]
        all_BA = fields[0]
        if not all_anchors:
            fields = [x.chunk(n, dim=1)[rank] for x in fields]
        position, sample, place, horizon, weight, row = fields
        if self.options.sfr.mean == "microbatch":
            sums_2 = sum_over_context(torch.stack([batch["anchor_weight"].sum(), batch["loss_mask"].sum()]))
            weight = mean_over_microbatch(weight, *sums_2)
        on_this_rank_BA1 = (weight > 0)[..., None]
        if all_anchors:
            weight = sum_over_context(weight.clone())  # each anchor has its weight on one rank
        state = head.state
        with record_function(TARGETS):
            stored_BAD = batch["target"][sample_B1, row]
            x_1 = scale_targets(stored_BAD, state.target_mean, state.target_std, self.options.targets)

        def gathered(h_BAH: Tensor) -> Tensor:
            return sum_parts_over_context(h_BAH * on_this_rank_BA1) if context_size() > 1 else h_BAH

        def pick(h_SBH: Tensor) -> Tensor:
            if not sharded:
                h_BAH = h_SBH[all_BA, sample_B1]
                return gathered(h_BAH) if all_anchors else h_BAH
            local_BA = all_BA - rank * len(h_SBH)
            here_BA = (local_BA >= 0) & (local_BA < len(h_SBH))
            h_BAH = h_SBH[local_BA.clamp(0, len(h_SBH) - 1), sample_B1] * here_BA[..., None]
            return gathered(sum_parts(h_BAH)) if all_anchors else spread_rows(h_BAH.transpose(0, 1)).transpose(0, 1)

        if "dataset_id" in batch:  # in a blend each dataset numbers its samples from 0
            sample = sample + (batch["dataset_id"][:, None] << DATASET_BITS)
        return Anchors(position, sample, place, horizon, weight, x_1), pick

    def _noise(self, anchors: Anchors, first_draw: int) -> tuple[Tensor, Tensor]:
        dim, sfr = anchors.x_1_BAD.shape[-1], self.options.sfr
        return draw_noise(anchors.sample_BA, anchors.place_BA, anchors.horizon_BA, dim, first_draw, sfr)

    def _errors(
        self, head: FlowHead, anchors: Anchors, noise: tuple[Tensor, Tensor], h_BAH: Tensor, *, averaged: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Errors, their weights and their times; the shapes broadcast to [B, A, K]."""
        x_0, t = noise
        call: Any = head  # call the module, so that its hooks run
        velocity = partial(call, horizon_BA=anchors.horizon_BA, averaged=averaged) if head.net is not None else None
        error, weight = anchor_errors(velocity, h_BAH, anchors.x_1_BAD, anchors.weight_BA, x_0, t, self.options.sfr)
        return error, weight, t[..., 0] if error.shape[1] == t.shape[1] else torch.zeros_like(weight)

    @torch.no_grad()
    def _move_gate(self, head: FlowHead, sums_2N: Tensor, step: int, microbatches: int) -> None:
        """After the last microbatch of a step, decides whether the gate is open in the next step."""
        if (total := self.gate_sums.add(step, microbatches, sums_2N)) is not None:
            gate, baseline = decide(total, head.state.baseline, self.options.gate)
            head.state.gate.copy_(gate)
            head.state.baseline.copy_(baseline)

    @torch.no_grad()
    def _move_statistics(self, head: FlowHead, batch: Batch, step: int, microbatches: int) -> None:
        """After the last microbatch of a step, updates the EMA of the target statistics for the next step."""
        state, targets = head.state, self.options.targets
        if targets.scale != "whiten" or targets.whiten != "ema":
            return
        sample_B1 = torch.arange(len(batch["target"]), device=batch["target"].device)[:, None]
        moments = batch_moments(batch["target"][sample_B1, batch["anchor_row"]], batch["anchor_weight"])
        if (total := self.target_sums.add(step, microbatches, moments)) is not None:
            kept = (state.target_mean, state.target_std, state.batches)
            for buffer, value in zip(kept, running_statistics(total, *kept, targets.whiten_decay), strict=True):
                buffer.copy_(value)
