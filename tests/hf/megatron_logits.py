"""Under torchrun: loads checkpoints into upstream's models and writes their logits. argv: a JSON list of [flags, file].

Each file holds tokens [B, S] and is replaced by the logits [B, S, V + padding].
"""

import json
import sys
from pathlib import Path

import torch


@torch.no_grad()
def logits(flags: list[str], tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the model that the flags describe and load."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_sfr.assembly import model_config
    from megatron_sfr.config import parse, read_settings

    args = parse(read_settings([*flags, "--train-data-path", "unread"]))
    training.initialize_megatron()
    (model,), _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config(args, "cpu")),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    position_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    out: torch.Tensor = model.eval()(tokens_BS, position_BS, None)
    training.destroy_global_state()
    return out


if __name__ == "__main__":
    from megatron_sfr.runtime import backend

    backend.start("cpu")
    for flags, file in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        torch.save(logits(flags, torch.load(file)), file)
