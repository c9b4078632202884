"""Loss, entropy and accuracy by persona, of the training data and of each validation set.

Each supervised token adds its values, which the pass over the logits has computed anyway, to the sums of its group: a
persona in a part of the data. The sums of all groups are one small tensor, which is reduced over the data-parallel
ranks only when it is reported.
Shapes: B samples, S positions, G groups.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.runtime.parallel import print_on_last_rank, sum_over_data
from megatron_sfr.storage.user_files import cut
from megatron_sfr.training.auxiliary_loss import StepSums
from megatron_sfr.training.data.persona_groups import Group
from megatron_sfr.training.metrics_log import JsonLines
from megatron_sfr.training.step_context import StepContext

NAMES = ("lm loss", "token entropy", "token accuracy")
SHOWN = 20
"""Personas of a part in TensorBoard, W&B and the log: those with the most conversations. metrics.jsonl has all."""
LABEL = 60
"""Characters of a persona's name there."""


@dataclass(frozen=True)
class PartMetrics:
    """The metrics of one part of the data."""

    part: str
    tokens: int
    """Supervised tokens."""
    personas: dict[str, dict[str, float]] = field(default_factory=dict)
    """Means over the supervised tokens of each persona, by the names in NAMES, and `tokens`. Empty without personas."""

    def tag(self, name: str) -> str:
        """The name of a metric of this part, as Megatron forms it."""
        return f"{name} {self.part}".rstrip()

    def shown(self) -> dict[str, dict[str, float]]:
        """The first SHOWN personas, with short and distinct names."""
        first = list(self.personas.items())[:SHOWN]
        return {_label(persona, number): metrics for number, (persona, metrics) in enumerate(first, start=1)}

    def __str__(self) -> str:
        lines = [f" {self.tag('by persona')}: {len(self.personas)} personas, {self.tokens:,} tokens"]
        for label, metrics in self.shown().items():
            values = ", ".join(f"{name} {metrics[name]:.6f}" for name in NAMES)
            lines.append(f"   {label}: {values}, {metrics['tokens']:,.0f} tokens")
        if (hidden := len(self.personas) - SHOWN) > 0:
            lines.append(f"   and {hidden:,} personas more, in metrics.jsonl")
        return "\n".join(lines)


class PersonaMetrics:
    """Sums by group, and their reports. Nothing of it is in a checkpoint."""

    def __init__(
        self,
        groups: Callable[[], Sequence[Group]],
        lines: JsonLines | None = None,
        wandb: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            groups: returns the groups that the batches' `group` numbers; called once the datasets are built.
            lines: where all personas are written, on the rank that writes metrics.
            wandb: returns upstream's W&B writer, on the rank that has one.
        """
        self.groups, self.lines, self.wandb = groups, lines, wandb
        self.step = StepSums()
        self.training: Tensor | None = None
        self.validation: Tensor | None = None

    def add(self, batch: dict[str, Tensor], values_3BS: Tensor, context: StepContext, *, training: bool) -> None:
        """Adds one microbatch.

        Args:
            batch: with `group` [B, S] and `loss_mask` [B, S]. Does nothing without groups, which other loops lack.
            values_3BS: cross-entropy, entropy and whether the most likely token is the label.
        """
        if "group" not in batch:
            return
        sums_G4 = sums_by_group(batch["group"], batch["loss_mask"], values_3BS, len(self.groups()))
        if not training:
            self.validation = sums_G4 if self.validation is None else self.validation + sums_G4
            return
        step_G4 = self.step.add_local(context.iteration, context.num_microbatches, sums_G4)
        if step_G4 is None:
            return
        self.training = step_G4 if self.training is None else self.training + step_G4
        if context.reports_personas:
            reports = self._reports(self.training)
            self.training = None
            self.write([report for report in reports if report.personas], context.iteration + 1, context.writer)

    def collect(self, _model: Any) -> list[PartMetrics]:
        """Upstream's non_loss_data_func, called on all ranks after each validation set: reduces and prints its metrics.

        Returns:
            The metrics of the set; none on ranks without a last pipeline stage.
        """
        if self.validation is None:
            return []
        reports = self._reports(self.validation)
        self.validation = None
        for report in reports:
            if report.personas:
                print_on_last_rank(str(report))
        return reports

    def write(self, reports: list[PartMetrics], iteration: int, writer: Any) -> None:
        """Upstream's process_non_loss_data_func: writes what `collect` returned. writer: TensorBoard's, or None."""
        if writer is None:
            return
        for report in reports:
            scalars = {report.tag("tokens"): float(report.tokens)} if report.part else {}
            for label, metrics in report.shown().items():
                scalars |= {f"{report.tag(name)} by persona/{label}": value for name, value in metrics.items()}
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
            if (wandb := self.wandb()) is not None and scalars:
                wandb.log(scalars, iteration)
            if self.lines is not None and report.personas:
                self.lines.add_table(report.tag("by persona"), report.personas, iteration)

    def _reports(self, sums_G4: Tensor) -> list[PartMetrics]:
        """The metrics of each part that has tokens. A collective call of the ranks with a last stage."""
        found: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for group, sums in zip(self.groups(), sum_over_data(sums_G4).tolist(), strict=True):
            if sums[-1]:
                found[group.part][group.persona] = sums
        return [_part_metrics(part, sums) for part, sums in found.items()]


def sums_by_group(group_BS: Tensor, mask_BS: Tensor, values_3BS: Tensor, groups: int) -> Tensor:
    """Sums of the values over the supervised tokens of each group, and the number of these tokens: fp64 [G, 4]."""
    columns_4BS = torch.cat([values_3BS.double(), torch.ones_like(mask_BS)[None].double()]) * mask_BS
    sums_G4 = columns_4BS.new_zeros(groups, len(columns_4BS))
    return sums_G4.index_add_(0, group_BS.flatten(), columns_4BS.flatten(1).t())


def _part_metrics(part: str, sums: dict[str, list[float]]) -> PartMetrics:
    tokens = int(sum(row[-1] for row in sums.values()))
    if set(sums) == {""}:
        return PartMetrics(part, tokens)
    personas = {
        persona: {name: x / row[-1] for name, x in zip(NAMES, row, strict=False)} | {"tokens": row[-1]}
        for persona, row in sums.items()
    }
    return PartMetrics(part, tokens, personas)


def _label(persona: str, number: int) -> str:
    name = " ".join(persona.split()) or "(none)"
    return name if len(name) <= LABEL else f"{cut(name, LABEL)} #{number}"
