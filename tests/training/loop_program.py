"""A program: forward steps on plain Megatron Core, without Megatron's training loop, and then as that loop calls them.

It prints JSON. Shapes: B samples, S positions, A anchors, D embedding dimension.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.runtime import backend

B, S, A, D, VOCAB, LAYERS, HIDDEN, HEADS, FFN, WIDTH = 2, 12, 4, 6, 61, 2, 16, 2, 24, 8
STEPS = 4
FLAGS = {
    "num-layers": LAYERS,
    "hidden-size": HIDDEN,
    "num-attention-heads": HEADS,
    "ffn-hidden-size": FFN,
    "seq-length": S,
    "max-position-embeddings": S,
    "vocab-size": VOCAB,
    "make-vocab-size-divisible-by": 8,
    "micro-batch-size": B,
    "global-batch-size": B,
    "train-iters": STEPS,
    "lr": 1e-3,
    "train-data-path": "unread",
    "normalization": "RMSNorm",
    "position-embedding-type": "rope",
    "sfr-backend": "cpu",
    "sfr-head-width": WIDTH,
    "sfr-weight": 2.0,
    "sfr-draws": 2,
    "sfr-layer": 1,
}
SWITCHES = ("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights")
SWITCHES += ("--no-check-for-nan-in-loss-and-grad",)  # upstream checks within its training step only


def make_batch(seed: int) -> dict[str, Tensor]:
    """Random tokens and targets; the first four positions are not supervised."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (B, S + 1), generator=g)
    position = torch.tensor([4, 6, 9, 11]).expand(B, A)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (torch.arange(S) >= 4).float().expand(B, S),
        "position_ids": torch.arange(S).expand(B, S),
        "anchor_position": position,
        "anchor_place": position,
        "anchor_sample": torch.arange(B)[:, None].expand(B, A) + 100 * seed,
        "anchor_row": torch.arange(A).expand(B, A),
        "anchor_horizon": torch.zeros(B, A, dtype=torch.int64),
        "anchor_weight": torch.ones(B, A),
        "target": torch.nn.functional.normalize(torch.randn(B, A, D, generator=g), dim=-1).half(),
    }


def gradients(call: Callable[[Any], tuple[Any, Any]], model: torch.nn.Module, seed: int) -> dict[str, Any]:
    """Loss, log and gradients of one microbatch."""
    model.zero_grad()
    output, loss = call(iter([make_batch(seed)]))
    total, tokens, report = loss(output)
    (total / tokens).backward()
    return {
        "loss": total.item(),
        "tokens": tokens.item(),
        "view": total._base is not None,
        "report": {name: x.tolist() for name, x in report.items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def plain_model(head: Any) -> Any:
    """A GPTModel as Megatron Core's documentation builds one, with a head if there is a plan for it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_sfr.model.attach_head import attach_head

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=64,
        max_sequence_length=S,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model if head is None else attach_head(head)([model])[0]


def as_upstreams_loop_calls_it(weights: dict[str, Tensor], head: Any) -> list[dict[str, Any]]:
    """The same steps by a run's arguments, plan and builder, with Megatron's global arguments."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_sfr.config.build import forward_step, model_config
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse, read_settings
    from megatron_sfr.model.builder import SFRModelBuilder
    from megatron_sfr.training.step_context import for_megatron

    # Without SFR, which would open the data: a recipe has to say that the options of SFR are not used.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
        recipe.write("sfr: false\n")
        recipe.flush()
        flags = [word for k, v in FLAGS.items() for word in (f"--{k}", str(v))]
        settings = read_settings(["--recipe", recipe.name, *flags, *SWITCHES])
    args = parse(settings)
    training.initialize_megatron()
    plan = plan_run(args, "cpu")
    config = model_config(plan)
    config.head = head
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = SFRModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    model.load_state_dict(weights)
    step = for_megatron(forward_step(replace(plan, data=replace(plan.data, sfr=True)), SimpleNamespace(online=None)))
    found = []
    for number in range(STEPS):
        args.curr_iteration = number
        found.append(gradients(lambda data: step(data, model), model, number))
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def compare_with_the_usual_way() -> dict[str, Any]:
    from megatron.training import global_vars

    from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
    from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
    from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
    from megatron_sfr.training.auxiliary_loss import TermOptions
    from megatron_sfr.training.bridge import forward_step
    from megatron_sfr.training.step_context import StepContext

    options = FlowHeadOptions(width=WIDTH, layer=1)
    head = FlowHeadPlan(options, dim=D, weight=2.0)
    model = randomized(plain_model(head))
    weights = copy.deepcopy(model.state_dict())  # the steps change the head's measurements
    schedule = ScheduleOptions(weight=2.0)
    step = forward_step(VOCAB, sfr=TermOptions(sfr=SFROptions(draws=2), head=options), schedule=schedule)
    given = [
        gradients(lambda data: step(StepContext(i, STEPS, 1, implementation="local"), data, model), model, i)  # noqa: B023
        for i in range(STEPS)
    ]
    arguments = global_vars._GLOBAL_ARGS
    state = bridge_state(1)
    bridge = gradients(lambda data: step(state, data, model), model, 1)
    forget_the_loop()
    usual = as_upstreams_loop_calls_it(weights, head)
    return {
        "global arguments": arguments,
        "losses": [[x["loss"], y["loss"]] for x, y in zip(given, usual, strict=True)],
        "reports": [[x["report"], y["report"]] for x, y in zip(given, usual, strict=True)],
        "gradients": [equal(x["gradients"], y["gradients"]) for x, y in zip(given, usual, strict=True)],
        "named": sorted(given[0]["gradients"]),
        "views": [x["view"] for x in given],
        "bridge": equal(bridge["gradients"], given[1]["gradients"]) and bridge["loss"] == given[1]["loss"],
    }


def bridge_state(step: int) -> SimpleNamespace:
    """The fields of Megatron-Bridge's GlobalState that are read."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    init_num_microbatches_calculator(0, None, B, B, 1)
    return SimpleNamespace(
        train_state=SimpleNamespace(step=step),
        tensorboard_logger=None,
        cfg=SimpleNamespace(
            train=SimpleNamespace(train_iters=STEPS),
            model=SimpleNamespace(transformer_impl="local"),
            rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=True),
        ),
    )


def forget_the_loop() -> None:
    """Removes what Megatron Core keeps for the process, so that Megatron's training loop can set it up."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()


def randomized(model: Any) -> Any:
    """Random weights for all parameters, so that the head's zero output layer passes a gradient on."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model


def train(model: Any, step: Any, steps: range, total: int) -> None:
    """AdamW with weight decay; the backbone is clipped by its own norm, as upstream's optimizer does."""
    from megatron_sfr.training.step_context import StepContext

    backbone = [p for name, p in model.named_parameters() if not name.startswith("flow_head.")]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    for number in steps:
        gradients(lambda data: step(StepContext(number, total, 1, implementation="local"), data, model), model, number)  # noqa: B023
        assert torch.nn.utils.clip_grad_norm_(backbone, 0.05) > 0.1
        optimizer.step()


def backbone_of(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if v is not None and not k.startswith("flow_head.")}


def decay_to_zero(decay: str, ends: int = 2, last: int = 5) -> dict[str, Any]:
    """SFR until its weight has decayed to 0 and for three more steps, against plain SFT from the same weights."""
    from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
    from megatron_sfr.objectives.sfr.schedule import ScheduleOptions, phase_at
    from megatron_sfr.training.auxiliary_loss import TermOptions
    from megatron_sfr.training.bridge import forward_step

    options = FlowHeadOptions(width=WIDTH)
    schedule = ScheduleOptions(weight=2.0, decay=decay)
    model, plain = randomized(plain_model(FlowHeadPlan(options, dim=D))), plain_model(None)
    step = forward_step(VOCAB, sfr=TermOptions(head=options), schedule=schedule)
    train(model, step, range(ends), ends)
    plain.load_state_dict(backbone_of(model))
    before = [p.detach().clone() for p in model.flow_head.net.parameters()]
    train(model, step, range(ends, last), ends)
    train(plain, forward_step(VOCAB), range(ends, last), ends)
    return {
        "shares": [phase_at(i, ends, schedule).share for i in range(last)],
        "equal": equal(backbone_of(model), backbone_of(plain)),
        "head learns": all(
            not torch.equal(p, q) for p, q in zip(model.flow_head.net.parameters(), before, strict=True)
        ),
    }


if __name__ == "__main__":
    backend.prepare(["--sfr-backend", "cpu"])
    import megatron_sfr.model.attach_head
    import megatron_sfr.training.bridge  # noqa: F401

    imported = [name for name in sys.modules if name.startswith("megatron.training")]
    backend.join("cpu")  # imports megatron.training, to replace names there
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from tests.training.own_loop import default_entries, errors, trained_example

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    found: dict[str, Any] = {decay: decay_to_zero(decay) for decay in ("linear", "cosine", "constant")}
    found |= {"imported": imported, "errors": errors(), "own loop": trained_example(), "defaults": default_entries()}
    print(json.dumps(found | compare_with_the_usual_way()))
