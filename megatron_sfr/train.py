"""The entry of torchrun: upstream's `pretrain` with our model, data and forward step.

torchrun --nproc-per-node 2 -m megatron_sfr.train --recipe FILE.yaml [any of Megatron's flags]
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from megatron_sfr.runtime import lifetime

ERROR = "megatron-sfr train: error:"


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say; ValueError for what the user can mend."""
    from megatron_sfr.assembly import check_task, forward_step, model_config
    from megatron_sfr.config import options, parse, read_settings
    from megatron_sfr.runtime import backend
    from megatron_sfr.training.dataset import DataProvider
    from megatron_sfr.training.head_optimizer import HeadOptimizerOptions, head_optimizer

    settings = read_settings(argv)
    backend.start(settings.backend)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"backend: {settings.backend}", *settings.changes, sep="\n  ", flush=True)
    args = parse(settings)
    check_task(args)
    config = model_config(args, settings.backend)
    if args.exit_signal_handler:  # Ctrl-C and SIGHUP end a run as SIGTERM does: after the step, with a checkpoint
        lifetime.stop_alike(args.exit_signal)
        lifetime.end_with_peers()
    if rank == 0 and args.save:
        save_recipe(settings.recipe, Path(args.save))
    lines = log_as_json_lines(args)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.distributed.checkpoint.api import CheckpointException

    container, data = pretrain_cfg_container_from_args(args, config), DataProvider()
    try:
        with head_optimizer(options(HeadOptimizerOptions, args)) if args.sfr else nullcontext():
            pretrain(container, data, ModelType.encoder_or_decoder, forward_step(args, data))
    except CheckpointException as error:
        raise _missing(error, args.pretrained_checkpoint or args.load) from error
    finally:
        data.close()
        if lines is not None:
            lines.flush()


def _missing(error: Any, checkpoint: str) -> Exception:
    """What upstream says of a parameter that a checkpoint lacks, without its list of all that is there."""
    for failure, _ in error.failures.values():
        name, found, _ = str(failure).strip("\"'").partition(" from model not in state dict")
        if found:
            remedy = "add --sfr-fresh-head to start one" if name.startswith("flow_head.") else "it is of another model"
            return ValueError(f"the checkpoint in {checkpoint} has no {name}: {remedy}")
    return error


def save_recipe(recipe: dict[str, Any], folder: Path) -> None:
    """Writes the resolved recipe to FOLDER/recipe.yaml, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".recipe.yaml"
    partial.write_text(yaml.safe_dump(recipe, sort_keys=True), encoding="utf-8")
    partial.replace(folder / "recipe.yaml")


def log_as_json_lines(args: Any) -> Any:
    """On the rank that has upstream's TensorBoard writer: the same scalars to SAVE/metrics.jsonl."""
    from megatron.training.global_vars import get_tensorboard_writer

    from megatron_sfr.training.metrics import JsonLines

    writer = get_tensorboard_writer()
    if writer is None or not args.save:
        return None
    Path(args.save).mkdir(parents=True, exist_ok=True)
    return JsonLines(writer, Path(args.save) / "metrics.jsonl")


lifetime.tie_rank(__name__)
if __name__ == "__main__":
    lifetime.run(main, sys.argv[1:], ERROR)
