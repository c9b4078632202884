"""The forward step: one microbatch through the model, cross-entropy and the flow-matching loss on its last stage.

Letters: S positions, B samples, H hidden size, V vocabulary columns of the shard, A anchors, D embedding dimension.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch import Tensor

from megatron_sfr.model.flow_head import FlowHead
from megatron_sfr.objectives.schedule import Phase, ScheduleOptions, phase_at
from megatron_sfr.objectives.sfr import SFROptions, draw_noise, flow_matching_loss, scale_targets
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.parallel import is_first_stage, is_last_stage, sum_parts, tensor_rank
from megatron_sfr.training.measure import GradientMeasurement, cross_entropy_power, flow_powers
from megatron_sfr.training.metrics import pair

Batch = dict[str, Tensor]


class ForwardStep:
    """Upstream's forward_step_func. Holds options and the measurement in progress, nothing that a checkpoint needs."""

    def __init__(self, vocab_size: int, sfr: SFROptions | None, schedule: ScheduleOptions) -> None:
        self.vocab_size, self.sfr, self.schedule = vocab_size, sfr, schedule
        self.measurement = GradientMeasurement(schedule.sfr_grad_ratio, schedule.sfr_weight)
        self.known_at = -1
        self.known: dict[str, Tensor] = {}  # what was measured before this step began: equal for all its microbatches

    def __call__(self, data_iterator: Iterator[Batch], model: GPTModel) -> tuple[Any, Any]:
        """One microbatch: the stage's output and, on the last stage, the function that turns it into losses."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        first, last = is_first_stage(vp_stage), is_last_stage(vp_stage)
        batch = _to_device(next(data_iterator)) if first or last else {}
        hook: dict[str, Any] = {}
        if last:
            head = self._head(model)
            self._begin(head)
            hook = {"output_processor": self.terms, "output_processor_context": (head, batch)}
        output = model(
            batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels") if last else None, **hook
        )
        return output, partial(self.loss, batch)

    def _head(self, model: GPTModel) -> FlowHead | None:
        return get_attr_wrapped_model(model, "flow_head") if self.sfr is not None else None

    def _begin(self, head: FlowHead | None) -> None:
        if head is not None and self.known_at != get_args().curr_iteration:
            self.known_at = get_args().curr_iteration
            self.known = {name: buffer.clone() for name, buffer in head.measured.named_buffers()}

    def _phase(self) -> Phase:
        args = get_args()
        return phase_at(args.curr_iteration, args.train_iters, self.schedule)

    def terms(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        context: tuple[FlowHead | None, Batch],
        compute_language_model_loss: Any,
        config: Any,
        runtime_gather_output: bool | None,
        scale_logits: Any,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Upstream's output_processor: cross-entropy [B, S] and the sum of the flow-matching loss, unweighted."""
        head, batch = context
        logits_SBV, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        logits_SBV = self._without_padding(scale_logits(logits_SBV))
        flow = hidden_states.new_zeros((), dtype=torch.float32)
        if head is not None and self.sfr is not None:
            phase = self._phase()
            if head.training and self._measured_step():
                weight_VH = output_layer.weight if output_weight is None else output_weight
                ce = cross_entropy_power(logits_SBV.detach(), labels, batch["loss_mask"], weight_VH)
                losses = tuple(
                    partial(self._flow, head, batch, first_draw=k, sharded=config.sequence_parallel)
                    for k in (0, self.sfr.sfr_draws)
                )
                powers = torch.cat([ce[None], flow_powers(losses, hidden_states, config.sequence_parallel)])
                self.measurement.add(get_args().curr_iteration, get_num_microbatches(), powers, head.measured)
            h_SBH = hidden_states.detach() if phase.detach else hidden_states
            flow = self._flow(head, batch, h_SBH, first_draw=0, sharded=config.sequence_parallel)
            if config.sequence_parallel:
                flow = sum_parts(flow)
        return compute_language_model_loss(labels, logits_SBV), flow

    def _flow(self, head: FlowHead, batch: Batch, h_SBH: Tensor, *, first_draw: int, sharded: bool) -> Tensor:
        """Flow-matching sum over the anchors that stand on this rank's positions."""
        assert self.sfr is not None
        position_BA, weight_BA = batch["anchor_position"], batch["anchor_weight"]
        local_BA = position_BA - (tensor_rank() * len(h_SBH) if sharded else 0)
        here_BA = (local_BA >= 0) & (local_BA < len(h_SBH))
        sample_B = torch.arange(h_SBH.shape[1], device=h_SBH.device)
        h_BAH = h_SBH[local_BA.clamp(0, len(h_SBH) - 1), sample_B[:, None]]
        x_1_BAD = scale_targets(batch["target"][sample_B[:, None], batch["anchor_row"]], self.sfr)
        x_0, t = draw_noise(batch["sample_index"], position_BA, x_1_BAD.shape[-1], first_draw, self.sfr)
        return flow_matching_loss(head, h_BAH, x_1_BAD, weight_BA * here_BA, x_0, t)

    def _without_padding(self, logits_SBV: Tensor) -> Tensor:
        """Columns that only pad the vocabulary to -inf, so that every tensor-parallel size trains the same model."""
        columns = logits_SBV.shape[-1]
        real = min(max(self.vocab_size - tensor_rank() * columns, 0), columns)
        if real == columns:
            return logits_SBV
        padding_V = torch.arange(columns, device=logits_SBV.device) >= real
        return logits_SBV.masked_fill(padding_V, float("-inf"))

    def _measured_step(self) -> bool:
        interval = self.schedule.sfr_measure_interval
        return interval > 0 and get_args().curr_iteration % interval == 0

    def loss(self, batch: Batch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict]:
        """Upstream's loss_func: the sum to differentiate, the tokens that divide it, and {name: [sum, count]}."""
        cross_entropy_BS, flow = output
        mask_BS = batch["loss_mask"]
        tokens = mask_BS.sum()
        total = cross_entropy = (cross_entropy_BS.float() * mask_BS).sum()
        report = {"lm loss": pair(cross_entropy, tokens)}
        if self.sfr is not None:
            phase = self._phase()
            steered = self.schedule.sfr_weight_control == "ratio"
            weight = phase.share * (self.known["weight"] if steered else self.schedule.sfr_weight)
            total = phase.cross_entropy * cross_entropy + weight * flow
            report["sfr loss"] = pair(flow, batch["anchor_weight"].sum().clamp(min=1e-20))
            report["sfr weight"] = pair(weight * tokens, tokens)
            if self.schedule.sfr_measure_interval > 0:  # as last measured, at this step's weight
                report["sfr grad ratio"] = pair(weight * self.known["ratio"] * tokens, tokens)
                report["sfr grad signal"] = pair(self.known["signal"] * tokens, tokens)
        if get_args().check_for_nan_in_loss_and_grad:
            get_rerun_state_machine().validate_result(
                result=total, rejection_func=torch.isnan, message="found NaN in the loss", tolerance=0.0, fatal=True
            )
        return total.view(()), tokens.to(torch.int), report


def _to_device(batch: Batch) -> Batch:
    return {name: x.to(device(), non_blocking=True) for name, x in batch.items()}
