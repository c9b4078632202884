"""Run as a rank: loads checkpoints into upstream's models and writes their logits. argv: a JSON list of [flags, file].

Each file holds tokens [B, S] and is replaced by the logits [B, S, V + padding], and by the tokens [B, S] that greedy
decoding gives after the first PROMPT of them.
"""

import json
import sys
from pathlib import Path

import torch

PROMPT = 80


@torch.no_grad()
def answer(flags: list[str], tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of the model that the flags describe and load."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_sfr.config.build import model_config
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse, read_settings

    args = parse(read_settings([*flags, "--train-data-path", "unread"]))
    training.initialize_megatron()
    (model,), _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config(plan_run(args, "cpu"))),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )

    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model.eval()(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)
        return out

    greedy_BS = tokens_BS[:, :PROMPT]
    while greedy_BS.shape[1] < tokens_BS.shape[1]:
        next_B = logits(greedy_BS)[:, -1, : args.vocab_size].argmax(-1)
        greedy_BS = torch.cat([greedy_BS, next_B[:, None]], dim=1)
    found = logits(tokens_BS), greedy_BS
    training.destroy_global_state()
    return found


if __name__ == "__main__":
    from megatron_sfr.runtime import backend

    backend.start("cpu")
    for flags, file in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        torch.save(answer(flags, torch.load(file)), file)
