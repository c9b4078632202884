"""The forward step: one microbatch through the model, with token objective and auxiliary loss on the last stage.

Shapes: S positions, B samples, H hidden size, V vocabulary columns of the shard.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tensorboard_writer
from megatron.training.utils import print_rank_last
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.model.flow_head import FlowHead
from megatron_sfr.objectives.sfr.schedule import Phase, ScheduleOptions, phase_at
from megatron_sfr.objectives.token.token_loss import IGNORED, TokenObjective, certainty, token_loss
from megatron_sfr.runtime.backend import device
from megatron_sfr.runtime.parallel import is_first_stage, is_last_stage, tensor_group, tensor_rank
from megatron_sfr.training.attention_mask import block_mask, packed_sequence
from megatron_sfr.training.auxiliary_loss import Batch, FlowTerm, Term
from megatron_sfr.training.data.provider import DataProvider
from megatron_sfr.training.gradient_ratio import GradientMeasurement, at_bound, flow_powers, token_power
from megatron_sfr.training.lock_fork import LockFork
from megatron_sfr.training.metrics_log import pair

# The last stage's output for one microbatch: objective and cross-entropy [B, S], and the sums of the auxiliary loss.
# Under bf16, upstream's wrapper converts it to plain tuples.
Losses = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]


class ForwardStep:
    """Upstream's forward_step_func. Holds options and partial sums, but no state that belongs in a checkpoint."""

    def __init__(
        self,
        vocab_size: int,
        name: str,
        objective: TokenObjective,
        term: FlowTerm | None,
        schedule: ScheduleOptions,
        resets_attention: bool,
        data: DataProvider | None = None,
        lock_fork: LockFork | None = None,
    ) -> None:
        self.vocab_size, self.name, self.objective = vocab_size, name, objective
        self.term, self.schedule, self.resets_attention = term, schedule, resets_attention
        self.data, self.lock_fork = data, lock_fork
        self.measurement = GradientMeasurement(schedule.sfr_grad_ratio, schedule.sfr_weight)
        self.reported_bound = False

    def __call__(self, data_iterator: Iterator[Batch], model: GPTModel) -> tuple[Any, Any]:
        """One microbatch: the stage's output and, on the last stage, the function that turns it into losses."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        first, last = is_first_stage(vp_stage), is_last_stage(vp_stage)
        batch = next_batch(data_iterator) if first or last or self.resets_attention else {}
        mask, more = self._attention(batch.pop("document")) if self.resets_attention else (None, {})
        if last and self.data is not None and self.data.online is not None:
            place = batch.pop("target_store"), batch.pop("target_row")
            batch["target"], batch["target_wait"] = self.data.online.targets(*place, training=model.training)
        batch = to_device(batch)
        if last:
            head = get_attr_wrapped_model(model, "flow_head") if self.term is not None else None
            if self.term is not None and head is not None:
                self.term.begin(head, get_args().curr_iteration, self.schedule.sfr_warmup_steps)
            more |= {"output_processor": self.losses, "output_processor_context": (head, batch)}
            more |= {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
        output = model(batch.get("tokens"), batch.get("position_ids"), mask, **more)
        return output, partial(self.loss, batch)

    def _attention(self, document_BS: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask and extra arguments that keep attention within the documents of a packed sequence."""
        if get_args().transformer_impl == "local":
            return block_mask(document_BS.to(device(), non_blocking=True)), {}
        params = packed_sequence(document_BS[0])  # micro_batch_size is 1: config/validation.py checks it
        params.cu_seqlens_q = params.cu_seqlens_kv = params.cu_seqlens_q.to(device(), non_blocking=True)
        return None, {"packed_seq_params": params}

    def _phase(self) -> Phase:
        args = get_args()
        return phase_at(args.curr_iteration, args.train_iters, self.schedule)

    def losses(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        context: tuple[FlowHead | None, Batch],
        config: Any,
        runtime_gather_output: bool | None,
        scale_logits: Any,
        **_: Any,
    ) -> Losses:
        """Upstream's output_processor: objective and cross-entropy of each token, and the auxiliary loss's sums."""
        head, batch = context
        logits_SBV, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        z_TV = scale_logits(logits_SBV).flatten(0, 1)
        y_T = torch.where(batch["loss_mask"] > 0, labels, IGNORED).t().reshape(-1)
        vocab = Vocab(self.vocab_size, tensor_rank() * z_TV.shape[-1], tensor_group())
        term = None
        if self.lock_fork is not None and torch.is_grad_enabled() and self.lock_fork.is_due(get_args().curr_iteration):
            self._measure_lock_fork(head, batch, hidden_states, z_TV, vocab, config.sequence_parallel)
        if head is not None:
            if head.training and self._measured_step():
                weight_VH = output_layer.weight if output_weight is None else output_weight
                power = token_power(z_TV, y_T, self.objective, vocab, weight_VH)
                self._measure(head, batch, hidden_states, power, config.sequence_parallel)
            term = self._flow(head, batch, hidden_states, config.sequence_parallel)
        objective_T, cross_entropy_T = token_loss(z_TV, y_T, self.objective, vocab, overwrite=True)
        shape = labels.shape[::-1]
        return objective_T.view(shape).t(), cross_entropy_T.view(shape).t(), term

    def _flow(self, head: FlowHead, batch: Batch, last_SBH: Tensor, sharded: bool) -> Term:
        assert self.term is not None
        h_SBH, head.caught = (last_SBH if head.caught is None else head.caught), None
        phase = self._phase()
        return self.term(
            head,
            batch,
            h_SBH,
            detach=phase.detach,
            sharded=sharded,
            microbatches=get_num_microbatches(),
            weight_at_h=self._weight(phase) if self.schedule.sfr_weight_on == "hidden" else 1.0,
        )

    def _measure(self, head: FlowHead, batch: Batch, last_SBH: Tensor, power: Tensor, sharded: bool) -> None:
        """Adds this microbatch to the squared gradient norms of a measured step."""
        assert self.term is not None
        h_SBH = last_SBH if head.caught is None else head.caught
        losses = self.term.losses(head, batch, sharded, self._phase().detach)
        powers = torch.cat([power[None], flow_powers(losses, h_SBH, sharded)])
        step, adaptive = get_args().curr_iteration, self.schedule.sfr_weight_control == "ratio"
        in_phase_a = step < self.schedule.sfr_warmup_steps
        reached = self.measurement.add(step, get_num_microbatches(), powers, head.state, restart=in_phase_a)
        if adaptive and reached is not None and not self.reported_bound and bool(reached):
            self.reported_bound = True
            print_rank_last(at_bound(step, float(head.state.weight), self.schedule.sfr_grad_ratio))

    def _measure_lock_fork(
        self, head: FlowHead | None, batch: Batch, last_SBH: Tensor, z_TV: Tensor, vocab: Vocab, sharded: bool
    ) -> None:
        """Adds this microbatch to the measurement of Lock and Fork positions."""
        assert self.lock_fork is not None
        rows = len(batch["labels"])
        entropy_BS, top_BS = (x.view(-1, rows).t() for x in certainty(z_TV, vocab))
        if head is None or head.net is None:
            sums = self.lock_fork.at_positions(entropy_BS, top_BS, batch["loss_mask"])
        else:
            assert self.term is not None
            anchors, pick = self.term.anchors(head, batch, sharded)
            h_BAH = pick(last_SBH if head.caught is None else head.caught)
            sums = self.lock_fork.at_anchors(head, h_BAH, anchors, entropy_BS, top_BS, split=sharded)
        self.lock_fork.add(get_args().curr_iteration, get_num_microbatches(), sums, get_tensorboard_writer())

    def _measured_step(self) -> bool:
        """True every sfr_measure_interval steps, and at the last step of phase A, where the adaptive weight starts."""
        interval, step = self.schedule.sfr_measure_interval, get_args().curr_iteration
        return interval > 0 and (step % interval == 0 or step == self.schedule.sfr_warmup_steps - 1)

    def loss(self, batch: Batch, losses: Losses) -> tuple[Tensor, Tensor, dict]:
        """Upstream's loss_func: the summed loss, the number of tokens that divides it, and {name: [sum, count]}."""
        objective_BS, cross_entropy_BS, sums = losses
        tokens, total = batch["loss_mask"].sum(), objective_BS.sum()
        report = {"lm loss": pair(cross_entropy_BS.sum(), tokens)}
        if self.name != "ce":
            report[f"{self.name} loss"] = pair(total, tokens)
        if sums is not None:
            term, phase = Term(*sums), self._phase()
            weight = self._weight(phase)
            term_factor = weight if self.schedule.sfr_weight_on == "loss" else 1.0  # otherwise applied at h
            total = phase.cross_entropy * total + term_factor * term.objective
            report |= self._report(term, weight, tokens)
        if "target_wait" in batch:
            report["target wait"] = pair(batch["target_wait"], torch.ones_like(batch["target_wait"][0]))
        check_finite(total)
        return total.view(()), tokens.to(torch.int), report

    def _weight(self, phase: Phase) -> Tensor | float:
        """The weight of the auxiliary loss at this step."""
        assert self.term is not None
        adaptive = self.schedule.sfr_weight_control == "ratio"
        return phase.share * (self.term.known["weight"] if adaptive else self.schedule.sfr_weight)

    def _report(self, term: Term, weight: Tensor | float, tokens: Tensor) -> dict[str, Tensor]:
        """The auxiliary loss's log entries. The gradient ratio is the last measurement times this step's weight."""
        assert self.term is not None
        known, options = self.term.known, self.term.options
        report = {
            "sfr loss": pair(term.loss, term.weight.clamp(min=1e-20)),
            "sfr weight": pair(weight * tokens, tokens),
        }
        if self.schedule.sfr_measure_interval > 0:
            if options.head.sfr_layer is None:
                report["sfr grad ratio"] = pair(weight * known["ratio"] * tokens, tokens)
            report["sfr grad signal"] = pair(known["signal"] * tokens, tokens)
        if options.gate.sfr_gate != "none":
            report["sfr gate"] = pair(known["gate"] * tokens, tokens)
        return report


def check_finite(total: Tensor) -> None:
    """Ends the run if the loss is NaN, as upstream's loss function does."""
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=total, rejection_func=torch.isnan, message="found NaN in the loss", tolerance=0.0, fatal=True
        )


def next_batch(data_iterator: Iterator[Batch]) -> Batch:
    """A copy of the next microbatch's dictionary: upstream keeps its own to be able to rerun a step."""
    return dict(next(data_iterator))


def to_device(batch: Batch) -> Batch:
    """Moves the microbatch to this process's device."""
    return {name: x.to(device(), non_blocking=True) for name, x in batch.items()}
