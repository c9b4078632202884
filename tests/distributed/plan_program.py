"""A program: builds model and optimizer of a run on each rank, and compares their bytes with the plan.

python -m tests.distributed.plan_program FOLDER FLAGS: rank N writes FOLDER/N.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main(folder: Path, flags: list[str]) -> None:
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse, read_settings
    from megatron_sfr.runtime import backend

    settings = read_settings(flags)
    backend.start("cpu")
    args = parse(settings)

    from megatron.core import parallel_state
    from megatron.training import training

    training.initialize_megatron()
    args.curr_iteration = 0
    plan = plan_run(args, "cpu")
    found = built(args, plan)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    planned = calculated(args, plan, stage)
    report = {"stage": stage, "found": found, "planned": planned, "data": parallel_state.get_data_parallel_rank()}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(report))


def built(args: Any, plan: Any) -> dict[str, int]:
    """Bytes of the weights, gradients and optimizer state on this rank, after a step with gradients of 0."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_sfr.config.build import model_config
    from megatron_sfr.runtime.replacements import replaced
    from megatron_sfr.training.head_optimizer import replacements

    with replaced(replacements(plan.head_optimizer)):
        chunks, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=pretrain_cfg_container_from_args(args, model_config(plan)),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.step()
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    model = {p.data_ptr() for p in parameters}
    state = {x.data_ptr(): x for x in states(optimizer) if x.data_ptr() not in model and x.numel() > 1}
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters if p.requires_grad),
        "optimizer": sum(x.nbytes for x in state.values()),
    }


def states(optimizer: Any) -> Iterator[Tensor]:
    """The parameters that the optimizer changes, and their moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for p, state in part.optimizer.state.items():
            yield p
            yield from (x for x in state.values() if isinstance(x, Tensor))


def calculated(args: Any, plan: Any, stage: int) -> dict[str, float]:
    """The same bytes by the plan. The flow head is on the last stage."""
    from megatron_sfr.planning.layout import layout_of
    from megatron_sfr.planning.memory import HeadSizes, plan_memory, state_bytes

    layout = layout_of(args)
    memory = plan_memory(args, layout, None).stages[stage]
    head, bytes_of = HeadSizes(plan.term.head, 384, plan.term.sfr.draws, 0.0), state_bytes(args)
    count = head.parameters(args.hidden_size) if args.sfr and stage == layout.pipeline - 1 else 0
    return {
        "weights": memory.weights + count * (bytes_of.weight + 4 * plan.term.head.stores_ema),
        "gradients": memory.gradients + count * bytes_of.gradient,
        "optimizer": memory.optimizer + count * bytes_of.optimizer / layout.shards,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
