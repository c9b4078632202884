"""Run as a rank: the velocities of heads that upstream loaded. argv: a JSON list of [flags, file].

Each file holds the arguments of the head's forward, and is replaced by what it answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def velocity(flags: list[str], inputs: dict[str, Any]) -> torch.Tensor:
    """What the head of the run that the flags describe and load answers."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_sfr.config.build import model_config
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse, read_settings

    args = parse(read_settings([*flags, "--skip-train", "--exit-on-missing-checkpoint"]))
    training.initialize_megatron()
    models, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config(plan_run(args, "cpu"))),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    out: torch.Tensor = unwrap_model(models[0]).flow_head.eval()(**inputs)
    training.destroy_global_state()
    return out


if __name__ == "__main__":
    from megatron_sfr.runtime import backend

    backend.start("cpu")
    for flags, file in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        torch.save(velocity(flags, torch.load(file)), file)
