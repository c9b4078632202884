"""The entry of torchrun: upstream's `pretrain` with our model, data and forward step.

torchrun --nproc-per-node 2 -m megatron_sfr.train --recipe FILE.yaml [any of Megatron's flags]
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from megatron_sfr.runtime import lifetime
from megatron_sfr.runtime.failures import recording
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.lock import hold

if TYPE_CHECKING:
    from megatron_sfr.config.run_plan import RunPlan
    from megatron_sfr.config.settings import Settings
    from megatron_sfr.runtime.replacements import Replacement
    from megatron_sfr.training.metrics_log import JsonLines
    from megatron_sfr.training.timing.step_speed import SpeedLog

ERROR = "megatron-sfr train: error:"
LOG = "train-%Y%m%d-%H%M%S.log"
"""The name of a run's log, by its start in local time."""
LOCK_WAIT_S = 10.0
"""How long to wait for a run in the same --save folder that was killed and whose processes are still ending."""
WARNING = "megatron-sfr train: warning:"


def main(argv: Sequence[str]) -> None:
    """Runs a training. Raises ValueError for what the user can correct."""
    started = time.time()
    from megatron_sfr.runtime import backend

    backend.prepare(argv)
    gc.disable()  # importing Megatron makes many objects and no garbage, and collecting takes a seventh of its time
    backend.import_megatron()
    from megatron_sfr.config.settings import read_settings

    gc.freeze()
    gc.enable()
    settings = read_settings(argv)
    save = Path(str(settings.recipe["save"])) if settings.recipe.get("save") else None
    first = int(os.environ.get("RANK", "0")) == 0
    lock = hold(save, inside=True, wait=LOCK_WAIT_S) if first and save else nullcontext()
    with lock, recording(save, first=first, started=started):
        _train(settings, first)


def _train(settings: "Settings", first: bool) -> None:
    """Runs a training whose folder is locked. Only the first rank prints."""
    from megatron_sfr.config.build import forward_step, model_config
    from megatron_sfr.config.resume import explained, repair_trackers
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse
    from megatron_sfr.runtime import backend
    from megatron_sfr.runtime.replacements import replaced
    from megatron_sfr.training.data.epochs import describe
    from megatron_sfr.training.data.provider import DataProvider
    from megatron_sfr.training.step_context import for_megatron
    from megatron_sfr.training.tracking import wandb_guard

    say: Callable[[str], None] = partial(print, flush=True) if first else lambda line: None
    backend.start(settings.backend, settings.recipe.get("distributed_timeout_minutes", 10))
    say("\n  ".join([f"backend: {settings.backend}", *settings.changes]))
    for line in repair_trackers(settings.recipe):
        say(line)
    os.environ |= {name: value for name, value in wandb_guard.FINISH.items() if name not in os.environ}
    args = parse(settings)
    if not _is_ready(args, say):
        return
    if first and (epochs := describe(vars(args))):
        say(epochs)
    plan = plan_run(args, settings.backend)
    config = model_config(plan)
    if args.exit_signal_handler:  # Ctrl-C and SIGHUP end a run as SIGTERM does: after the step, with a checkpoint
        lifetime.stop_alike(args.exit_signal)
        lifetime.end_with_peers()
    if first and args.save:
        save_recipe(settings.recipe, Path(args.save))

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    lines, speed = json_lines(plan, settings.recipe), speed_log(settings.backend)
    container, data = pretrain_cfg_container_from_args(args, config), DataProvider(plan.datasets)
    step = forward_step(plan, data, lines)
    try:
        with replaced(replacements(plan, lines, speed)), explained(args.pretrained_checkpoint or args.load):
            pretrain(container, data, ModelType.encoder_or_decoder, for_megatron(step, speed.timed), **hooks(step))
    except SystemExit as end:  # upstream's exit code is 0 also where it cannot load a checkpoint
        if not end.code and not hasattr(args, "curr_iteration"):
            raise ValueError("Megatron ended before the first step; the last lines of its output say why") from end
        raise
    finally:
        data.close()
        if lines is not None:
            lines.close(failed=not isinstance(sys.exception(), SystemExit | None))


def hooks(step: Any) -> dict[str, Callable[..., Any]]:
    """Upstream's hooks after each validation set; none for a step without metrics by persona."""
    if (personas := getattr(step, "personas", None)) is None:
        return {}
    return {"non_loss_data_func": personas.collect, "process_non_loss_data_func": personas.write}


def _is_ready(args: Any, say: Callable[[str], None]) -> bool:
    """Checks data and checkpoint of a run before anything is built. Returns whether steps are left to train."""
    from megatron_sfr.config.build import check_task, dequantized_start, other_tokenizer, unknown_end
    from megatron_sfr.config.objective import reference_store, selected_loss
    from megatron_sfr.config.resume import changed_data, check_schedule, check_targets, resumed_step
    from megatron_sfr.training.data.prepared_check import check_prepared, data_warnings, flow_targets, reply_end_tokens

    if args.lr is None and not args.skip_train:
        raise ValueError("lr is missing: set the largest learning rate of the schedule")
    stored, warnings = check_task(args)
    step = resumed_step(args)
    if step >= (args.train_iters or math.inf) and not args.skip_train:
        say(f"{args.load} has {step} steps already, of {args.train_iters}")
        return False
    args.flow_targets = flow_targets(args)  # upstream keeps the arguments in its checkpoints
    if step:
        check_targets(args, stored)
        if args.profile and step >= args.profile_step_end:
            say(f"the steps to profile end before step {args.profile_step_end}, and the run resumes after {step}")
        if adapted := check_schedule(args, stored):
            say(adapted)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_prepared(args, reference_store(selected_loss(args)[1]))
    args.reply_end_tokens = reply_end_tokens(args)
    data = changed_data(args, stored) if step else None
    if args.lr == 0 and not args.skip_train:
        warnings.append("lr is 0: no weight will change")
    warnings += data_warnings(args)
    of_start = other_tokenizer(args), unknown_end(args), dequantized_start(args)
    for warning in filter(None, (*warnings, *of_start, data)):
        say(f"{WARNING} {warning}")
    return True


def save_recipe(recipe: dict[str, Any], folder: Path) -> None:
    """Writes the resolved recipe to FOLDER/recipe.yaml, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "recipe.yaml") as file:
        yaml.safe_dump(recipe, file, sort_keys=True)


def json_lines(plan: "RunPlan", recipe: dict[str, Any]) -> "JsonLines | None":
    """SAVE/metrics.jsonl, and MLflow, on the rank that has upstream's TensorBoard writer."""
    from megatron.training.global_vars import get_tensorboard_writer

    from megatron_sfr.training.metrics_log import JsonLines
    from megatron_sfr.training.tracking.mlflow_log import MLflowLog

    args = plan.megatron
    if not args.save and plan.mlflow.experiment is not None:
        raise ValueError("mlflow_experiment needs `save`, the folder that names the run to continue: set it")
    if get_tensorboard_writer() is None or not args.save:
        return None
    save = Path(args.save)
    save.mkdir(parents=True, exist_ok=True)
    mlflow = None if plan.mlflow.experiment is None else MLflowLog(plan.mlflow, save, recipe)
    return JsonLines(save / "metrics.jsonl", lambda: int(args.iteration), mlflow)


def speed_log(backend: Literal["cpu", "cuda"]) -> "SpeedLog":
    """What measures the steps of this rank."""
    from megatron.training.global_vars import get_wandb_writer

    from megatron_sfr.runtime.devices import gpu_name
    from megatron_sfr.training.timing.step_speed import SpeedLog

    return SpeedLog(gpu_name(backend), get_wandb_writer)


def replacements(plan: "RunPlan", lines: "JsonLines | None", speed: "SpeedLog") -> "list[Replacement]":
    """The names of upstream that are replaced while it trains, on any backend."""
    from megatron.training.global_vars import get_wandb_writer

    from megatron_sfr.hf.megatron import disk_room, finite_weights, retention
    from megatron_sfr.runtime import durable, resharding, synchronous_save
    from megatron_sfr.training import head_optimizer, metrics_log
    from megatron_sfr.training.timing import profile, step_speed
    from megatron_sfr.training.tracking import wandb_guard

    table = [*durable.REPLACEMENTS, *resharding.REPLACEMENTS, *synchronous_save.REPLACEMENTS]
    table += step_speed.replacements(speed)
    if get_wandb_writer() is not None:
        table += wandb_guard.replacements()
    if plan.megatron.profile:
        table += profile.replacements()
    if plan.data.sfr:
        table += head_optimizer.replacements(plan.head_optimizer)
    if lines is not None:
        table += metrics_log.replacements(lines)
    if plan.megatron.save:
        table += disk_room.replacements(Path(plan.megatron.save))
        table += finite_weights.replacements(Path(plan.megatron.save))
        table += retention.replacements(Path(plan.megatron.save), plan.retention)
    return table


lifetime.tie_rank(__name__)
if __name__ == "__main__":
    lifetime.run(main, sys.argv[1:], ERROR)
