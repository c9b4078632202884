"""What a loop of one's own meets: mistakes and their answers, defaults of a batch, and the example that trains.

For loop_program.py, whose process has set up the CPU backend.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import optimizer
from torch import Tensor

from examples.own_loop import train
from megatron_sfr.model.attach_head import attach_head
from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.training.auxiliary_loss import TermOptions
from megatron_sfr.training.bridge import flow_head_plan, forward_step
from megatron_sfr.training.step_context import StepContext
from tests.training.loop_program import STEPS, VOCAB, A, B, D, S, make_batch, plain_model, randomized


def errors() -> dict[str, str]:
    """What mistakes in a loop of one's own are answered with."""
    plan, batch, context = (
        FlowHeadPlan(FlowHeadOptions(), D),
        make_batch(0),
        StepContext(0, STEPS, 1, implementation="local"),
    )
    model, step = plain_model(plan), forward_step(VOCAB, sfr=TermOptions())
    gated = forward_step(VOCAB, sfr=TermOptions(gate=GateOptions("static")))

    def without(name: str) -> dict[str, Tensor]:
        return {key: x for key, x in batch.items() if key != name}

    tries: dict[str, Callable[[], Any]] = {
        "layer": lambda: plain_model(FlowHeadPlan(FlowHeadOptions(layer=9), dim=D)),
        "head": lambda: step(context, iter([batch]), plain_model(None)),
        "gate": lambda: gated(context, iter([batch]), model),
        "wrapped": lambda: attach_head(plan)([torch.nn.Linear(2, 2)]),
        "name": lambda: forward_step(VOCAB, loss="gem"),
        "entry": lambda: step(context, iter([without("target")]), model),
        "shape": lambda: step(context, iter([batch | {"loss_mask": torch.ones(B, S + 1)}]), model),
        "label": lambda: step(context, iter([batch | {"labels": torch.full((B, S), -100)}]), model),
        "dim": lambda: step(context, iter([batch | {"target": torch.zeros(B, A, D + 1)}]), model),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def default_entries() -> bool:
    """Whether a batch without the entries that have defaults has the same loss."""
    step, model = forward_step(VOCAB, sfr=TermOptions()), randomized(plain_model(flow_head_plan(D)))
    context, batch = StepContext(0, STEPS, 1, implementation="local"), make_batch(0)
    fewer = {name: x for name, x in batch.items() if name not in ("anchor_place", "anchor_row", "anchor_horizon")}
    (one, one_loss), (other, other_loss) = (step(context, iter([x]), model) for x in (batch, fewer))
    return torch.equal(one_loss(one)[0], other_loss(other)[0])


def trained_example() -> dict[str, Any]:
    """The example of a loop of one's own, with Megatron's optimizer, and whether it leaves upstream as it was."""
    before = optimizer.SEPARATE_GRAD_NORM_GROUPS
    logged = train.train(train.make_model(1, 1), steps=4)
    return {"logged": logged, "restored": optimizer.SEPARATE_GRAD_NORM_GROUPS is before}
