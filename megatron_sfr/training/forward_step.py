"""The forward step: one microbatch through the model, with token objective and auxiliary loss on the last stage.

Shapes: S positions, B samples, H hidden size, V vocabulary columns of the shard.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor
from torch.profiler import record_function

from megatron_sfr.model.attach_head import FlowInputs, layer_output
from megatron_sfr.model.model_class import ensure_output_processor
from megatron_sfr.model.multi_token import predicted_states
from megatron_sfr.model.state import StepStart
from megatron_sfr.objectives.sfr.schedule import Phase, ScheduleOptions, phase_at
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.runtime.parallel import context_size, is_first_stage, is_last_stage, print_on_last_rank
from megatron_sfr.training.attention_mask import document_attention
from megatron_sfr.training.auxiliary_loss import TARGETS, Batch, FlowTerm, Term
from megatron_sfr.training.data.multi_token_labels import multi_token_labels
from megatron_sfr.training.data.sequence_shard import on_this_rank
from megatron_sfr.training.gradient_ratio import GradientMeasurement, at_bound, flow_powers
from megatron_sfr.training.lm_head import CHUNK_TOKENS, LastStage, Measured, MultiTokenLoss, TokenObjective, TokenResult
from megatron_sfr.training.lock_fork import LockFork
from megatron_sfr.training.persona_metrics import NAMES, PersonaMetrics
from megatron_sfr.training.step_context import StepContext

if TYPE_CHECKING:
    from megatron_sfr.training.data.provider import DataProvider

BACKBONE, LOSS, HEAD = "sfr: backbone", "sfr: token loss", "sfr: flow head"
"""Ranges of the forward pass in a profiler's trace."""

# The last stage's output for one microbatch: the objective's sum, to be differentiated; objective and cross-entropy
# [B, S] and the sums [2] of entropy and accuracy, for the log; the losses of multi-token prediction; the sums of the
# auxiliary loss. Under bf16, upstream's wrapper converts it to plain tuples.
Losses = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor, Tensor] | None]


@dataclass(frozen=True)
class Microbatch:
    """What the losses of one microbatch are computed from, apart from the last hidden states."""

    batch: Batch
    context: StepContext
    flow: FlowInputs | None = None
    """None without an auxiliary loss, and on other stages than the last."""
    backbone: ExitStack = field(default_factory=ExitStack)
    """The profiler's range of the backbone, which ends where the losses begin."""


class ForwardStep:
    """One microbatch of training. Holds options and partial sums, but no state that belongs in a checkpoint."""

    def __init__(
        self,
        vocab_size: int,
        name: str,
        objective: TokenLoss,
        term: FlowTerm | None,
        schedule: ScheduleOptions,
        resets_attention: bool,
        data: "DataProvider | None" = None,
        lock_fork: LockFork | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        personas: PersonaMetrics | None = None,
        divides_documents: bool = False,
    ) -> None:
        """
        Args:
            name: of the objective, for the log.
            term: the auxiliary loss; None trains on the objective alone.
            resets_attention: whether attention stays within the documents that a batch numbers.
            data: where online targets come from; None if every batch contains its targets.
            chunk_tokens: number of positions whose logits exist at a time; 0: all.
            personas: metrics by persona; None: not measured.
            divides_documents: whether context-parallel ranks divide each document also on local attention.
        """
        self.name, self.objective = name, TokenObjective(vocab_size, objective, chunk_tokens)
        self.multi_token = MultiTokenLoss(vocab_size, chunk_tokens)
        self.term, self.schedule, self.data, self.lock_fork = term, schedule, data, lock_fork
        self.personas, self.resets_attention, self.divides_documents = personas, resets_attention, divides_documents
        self.measurement = GradientMeasurement(schedule.grad_ratio, schedule.weight)
        self.reported_bound = False
        self.checked: MegatronModule | None = None  # the model that is known to take an output processor

    def __call__(self, data_iterator: Iterator[Batch], model: MegatronModule, context: StepContext) -> tuple[Any, Any]:
        """One microbatch: the stage's output and, on the last stage, the function that turns it into losses."""
        vp_stage, device = get_attr_wrapped_model(model, "vp_stage"), next(model.parameters()).device
        first, last = is_first_stage(vp_stage), is_last_stage(vp_stage)
        batch = next_batch(data_iterator) if first or last or self.resets_attention else {}
        more: dict[str, Any] = {"attention_mask": None}
        bounds: Tensor | None = None
        layers = get_model_config(model).mtp_num_layers or 0 if last else 0
        batch = multi_token_labels(batch, layers) if layers else batch
        if self.resets_attention:
            thd = context.implementation != "local" or self.divides_documents
            more, bounds = document_attention(batch.pop("document"), device, thd=thd)
        if last and self.data is not None and self.data.online is not None:
            place = batch.pop("target_store"), batch.pop("target_row")
            with record_function(TARGETS):
                batch["target"], batch["target_wait"] = self.data.online.targets(*place, training=model.training)
        if batch and context_size() > 1:
            batch = on_this_rank(batch, bounds)
        if last:
            batch |= self._positions(batch, context, device)
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        flow: FlowInputs | None = None
        reads_layer: AbstractContextManager[Any] = nullcontext()
        if last and self.term is not None:
            head = get_attr_wrapped_model(model, "flow_head")
            flow = FlowInputs(head, self.term.begin(head, context.iteration, self.schedule.warmup_steps), [])
            reads_layer = layer_output(model, self.term.options.head.layer, flow.layer)
        microbatch = Microbatch(batch, context, flow)
        if last:
            self.checked = model if model is self.checked else ensure_output_processor(model)
            more |= {"output_processor": self.losses, "output_processor_context": microbatch}
            more |= {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
        with microbatch.backbone, reads_layer, predicted_states() if layers else nullcontext():
            microbatch.backbone.enter_context(record_function(BACKBONE))
            output = model(batch.get("tokens"), batch.get("position_ids"), **more)
        return output, partial(self.loss, microbatch)

    def _positions(self, batch: Batch, context: StepContext, device: torch.device) -> Batch:
        """The positions that get logits, in memory from which they are copied to the device without waiting."""
        index_N = self.objective.positions(batch, self._measures_lock_fork(context))
        found = self.multi_token.positions(batch) | ({} if index_N is None else {"logit_position": index_N})
        pins = device.type == "cuda"
        return {name: x.pin_memory() if pins and not x.is_cuda else x for name, x in found.items()}

    def _phase(self, context: StepContext) -> Phase:
        return phase_at(context.iteration, context.train_iters, self.schedule)

    def losses(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        context: Microbatch,
        config: Any,
        runtime_gather_output: bool | None,
        scale_logits: Any,
        **_: Any,
    ) -> Losses:
        """Upstream's output_processor: objective and cross-entropy of each token, and the auxiliary loss's sums."""
        microbatch, flow, sharded = context, context.flow, config.sequence_parallel
        microbatch.backbone.close()
        hidden_states, *predicted = hidden_states.chunk(1 + (config.mtp_num_layers or 0))
        stage = LastStage(hidden_states, output_layer, output_weight, runtime_gather_output, scale_logits, config)
        measured = Measured(
            power=flow is not None and flow.head.training and self._is_measured(microbatch.context.iteration),
            entropy=self._measures_lock_fork(microbatch.context),
        )
        counts = self.term is None or self._phase(microbatch.context).cross_entropy != 0
        with record_function(LOSS):
            result = self.objective(stage, labels, microbatch.batch, measured, counts=counts)
            multi_token = self.multi_token(stage, predicted, microbatch.batch, counts=counts)
        if measured.entropy:
            self._measure_lock_fork(microbatch, hidden_states, result, sharded)
        term = None
        if flow is not None:
            h_SBH = flow.states(hidden_states)
            if result.power is not None:
                self._measure(microbatch, flow, h_SBH, result.power, sharded)
            with record_function(HEAD):
                term = self._flow(microbatch, flow, h_SBH, sharded)
        measured_3BS = torch.stack(result.values[1:])
        if self.personas is not None:
            self.personas.add(microbatch.batch, measured_3BS, microbatch.context, training=torch.is_grad_enabled())
        measured_sums = measured_3BS[1:].sum((1, 2))
        return result.total, result.values.loss, result.values.cross_entropy, measured_sums, multi_token, term

    def _flow(self, microbatch: Microbatch, flow: FlowInputs, h_SBH: Tensor, sharded: bool) -> Term:
        assert self.term is not None
        phase = self._phase(microbatch.context)
        return self.term(
            flow.head,
            microbatch.batch,
            h_SBH,
            flow.start,
            detach=phase.detach,
            sharded=sharded,
            microbatches=microbatch.context.num_microbatches,
            weight_at_h=self._weight(phase, flow.start) if self.schedule.weight_on == "hidden" else 1.0,
        )

    def _measure(self, microbatch: Microbatch, flow: FlowInputs, h_SBH: Tensor, power: Tensor, sharded: bool) -> None:
        """Adds this microbatch to the squared gradient norms of a measured step."""
        assert self.term is not None
        context, state = microbatch.context, flow.head.state
        losses = self.term.losses(flow.head, microbatch.batch, sharded, self._phase(context).detach)
        powers = torch.cat([power[None], flow_powers(losses, h_SBH, sharded)])
        step, adaptive = context.iteration, self.schedule.weight_control == "ratio"
        in_phase_a = step < self.schedule.warmup_steps
        reached = self.measurement.add(step, context.num_microbatches, powers, state, restart=in_phase_a)
        if adaptive and reached is not None and not self.reported_bound and bool(reached):
            self.reported_bound = True
            print_on_last_rank(at_bound(step, float(state.weight), self.schedule.grad_ratio))

    def _measures_lock_fork(self, context: StepContext) -> bool:
        return self.lock_fork is not None and torch.is_grad_enabled() and self.lock_fork.is_due(context.iteration)

    def _measure_lock_fork(self, microbatch: Microbatch, last_SBH: Tensor, result: TokenResult, sharded: bool) -> None:
        """Adds this microbatch to the measurement of Lock and Fork positions."""
        assert self.lock_fork is not None
        batch, context, flow = microbatch.batch, microbatch.context, microbatch.flow
        entropy_BS, top_BS = result.entropy_BS, result.max_prob_BS
        assert entropy_BS is not None
        assert top_BS is not None
        if flow is None or flow.head.net is None:
            sums = self.lock_fork.at_positions(entropy_BS, top_BS, batch["loss_mask"])
        else:
            assert self.term is not None
            anchors, pick = self.term.anchors(flow.head, batch, sharded)
            h_BAH = pick(flow.states(last_SBH))
            sums = self.lock_fork.at_anchors(flow.head, h_BAH, anchors, entropy_BS, top_BS, split=sharded)
        self.lock_fork.add(context.iteration, context.num_microbatches, sums, context.writer)

    def _is_measured(self, step: int) -> bool:
        """True every sfr_measure_interval steps, and at the last step of phase A, where the adaptive weight starts."""
        interval = self.schedule.measure_interval
        return interval > 0 and (step % interval == 0 or step == self.schedule.warmup_steps - 1)

    def loss(self, microbatch: Microbatch, losses: Losses) -> tuple[Tensor, Tensor, dict]:
        """Upstream's loss_func: the summed loss, the number of tokens that divides it, and {name: [sum, count]}."""
        total, objective_BS, cross_entropy_BS, measured, multi_token, sums = losses
        batch, context = microbatch.batch, microbatch.context
        tokens = batch["loss_mask"].sum()
        report = {"lm loss": pair(cross_entropy_BS.sum(), tokens)}
        report |= {name: pair(x, tokens) for name, x in zip(NAMES[1:], measured, strict=True)}
        if self.name != "ce":
            report[f"{self.name} loss"] = pair(total, tokens)
            for name, values_BS in self.objective.loss.logged(objective_BS, cross_entropy_BS).items():
                report[name] = pair((values_BS * batch["loss_mask"]).sum(), tokens)
        if multi_token is not None:
            total = total + multi_token[0]
            for k, (loss, correct, count) in enumerate(multi_token[1], start=1):  # with Megatron's names and units
                report[f"mtp_{k} loss"] = pair(loss, count)
                report[f"mtp_{k}_acceptance_rate"] = pair(100 * correct, count)
        if sums is not None:
            assert microbatch.flow is not None
            term, phase, start = Term(*sums), self._phase(context), microbatch.flow.start
            weight = self._weight(phase, start)
            term_factor = weight if self.schedule.weight_on == "loss" else 1.0  # otherwise applied at h
            total = phase.cross_entropy * total + term_factor * term.objective
            report |= self._report(term, start, weight, tokens)
        if "target_wait" in batch:
            report["target wait"] = pair(batch["target_wait"], torch.ones_like(batch["target_wait"][0]))
        if context.checks_nan:
            check_finite(total)
        return total.sum(), tokens.to(torch.int), report  # not a view: upstream frees it

    def _weight(self, phase: Phase, start: StepStart) -> Tensor | float:
        """The weight of the auxiliary loss at this step."""
        adaptive = self.schedule.weight_control == "ratio"
        return phase.share * (start.weight if adaptive else self.schedule.weight)

    def _report(self, term: Term, start: StepStart, weight: Tensor | float, tokens: Tensor) -> dict[str, Tensor]:
        """The auxiliary loss's log entries. The gradient ratio is the last measurement times this step's weight."""
        assert self.term is not None
        options = self.term.options
        report = {
            "sfr loss": pair(term.loss, term.weight.clamp(min=1e-20)),
            "sfr weight": pair(weight * tokens, tokens),
        }
        if self.schedule.measure_interval > 0:
            if options.head.layer is None:
                report["sfr grad ratio"] = pair(weight * start.ratio * tokens, tokens)
            report["sfr grad signal"] = pair(start.signal * tokens, tokens)
        if options.gate.kind != "none":
            report["sfr gate"] = pair(start.gate * tokens, tokens)
        return report


def pair(total: Tensor | float, count: Tensor) -> Tensor:
    """[sum, count] of one microbatch. Upstream sums both over the global batch and logs their ratio."""
    total = torch.as_tensor(total, dtype=torch.float32, device=count.device)
    return torch.stack([total.detach().view(()), count.float()])


def check_finite(total: Tensor) -> None:
    """Ends the run if the loss is NaN, as upstream's loss function does."""
    get_rerun_state_machine().validate_result(
        result=total, rejection_func=torch.isnan, message="found NaN in the loss", tolerance=0.0, fatal=True
    )


def next_batch(data_iterator: Iterator[Batch]) -> Batch:
    """A copy of the next microbatch's dictionary: upstream keeps its own to be able to rerun a step."""
    return dict(next(data_iterator))
