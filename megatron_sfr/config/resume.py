"""Checks before a run loads a checkpoint: that it exists, and that the run can continue with its options and data."""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sfr.hf.megatron.hybrid_names import PATTERN
from megatron_sfr.hf.megatron.megatron_model import COMPARED
from megatron_sfr.hf.megatron.tracker import METADATA, RELEASE, TRACKER, Newest, incomplete, newest, step_folder
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.user_files import shown
from megatron_sfr.training.data.epochs import reorders_documents

SCHEDULE = (
    *("train_iters", "train_samples", "global_batch_size", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
"""Upstream's arguments that make up the schedule of learning rate and weight decay."""
STATE = (
    *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "sfr_head_lr_mult"),
    *("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "muon_momentum", "lion_beta1", "lion_beta2"),
    "use_distributed_optimizer",
)
"""Those that the optimizer state depends on. Megatron cannot load it with other rates, and silently keeps its betas."""
DATA = ("seed", "train_data_path", "data_path", "split", "seq_length", "sfr_packing", "dataloader_type")
"""Those that decide which sequence is read at which step."""
LENGTH = ("train_iters", "train_samples", "global_batch_size")
"""So does the length of a run that repeats documents."""
EXPERTS = "expert_model_parallel_size"
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", EXPERTS, "expert_tensor_parallel_size")
HALF = ("bf16", "fp16")
_OTHER_PARAMETERS = (
    "is that of other parameters than this run trains: set the options of model, head and optimizer as they were, or "
    "no_load_optim: true to continue with a new optimizer"
)
_SIZES = re.compile(
    r"Global shape mismatch for loaded \(torch\.Size\(\[(.*?)\]\)\) and expected \(\((.*?),?\)\) tensor for key (\S+)"
)


def repair_trackers(recipe: Mapping[str, Any]) -> list[str]:
    """Corrects the trackers of the folders that a run loads from, so that they name complete checkpoints.

    Every process does so by itself, with the same result: upstream reads the trackers before processes communicate.

    Args:
        recipe: the resolved recipe of the run, with underscores in its keys.
    Returns:
        Lines to print about what was corrected.
    Raises:
        ValueError: a folder has a tracker but no complete checkpoint, its tracker cannot be written, or the checkpoint
            to start from does not exist.
    """
    notes = []
    any_format = recipe.get("ckpt_format", "torch_dist") != "torch_dist"
    folders = dict.fromkeys(recipe[key] for key in ("load", "pretrained_checkpoint") if recipe.get(key))
    checkpoints = {folder: newest(Path(folder), any_format=any_format) for folder in folders if "://" not in folder}
    _check_start(recipe, checkpoints)
    for folder, found in ((Path(path), found) for path, found in checkpoints.items()):
        if found is None or found.note is None:
            continue
        if found.repair is not None:
            try:
                with replacing(folder / TRACKER) as file:
                    file.write(found.repair)
            except OSError as error:
                raise ValueError(
                    f"{found.note}, but the file cannot be corrected ({error.strerror}): write {found.repair} into it"
                ) from error
        notes.append(found.note)
    return notes


def _check_start(recipe: Mapping[str, Any], checkpoints: Mapping[str, Newest | None]) -> None:
    """Raises ValueError if a folder that the run is to start from has no checkpoint.

    Upstream would only print a warning, and train from random weights. A new run's own folder may be empty.
    """
    load, own = recipe.get("load"), recipe.get("save")
    if load and (load not in checkpoints or checkpoints[load] is not None):
        return
    key = "pretrained_checkpoint" if recipe.get("pretrained_checkpoint") else "load"
    if key == "load":
        is_new = load and own and Path(load).resolve() == Path(own).resolve()
        if not load or is_new or recipe.get("sfr_hf_load"):
            return
    folder: str = recipe[key]
    if folder not in checkpoints or checkpoints[folder] is not None:
        return
    path, hint = Path(folder), "name a folder that a run saved to or that `megatron-sfr convert import` wrote"
    if path.name == RELEASE or path.name.startswith("iter_") or (path / METADATA).is_file():
        hint = f"name the folder above it, {path.parent}, and set ckpt_step for another checkpoint than its newest"
    raise ValueError(f"{key}: {folder} has no {TRACKER}, so there is nothing to start from: {hint}")


def resumed_step(args: argparse.Namespace) -> int:
    """The step at which a run resumes; 0 for a new run. Raises ValueError if ckpt_step has no complete checkpoint."""
    if args.finetune or not args.load or "://" in args.load:
        return 0
    any_format = args.ckpt_format != "torch_dist"
    found = newest(Path(args.load), any_format=any_format)
    if found is None or found.step == 0:
        return 0
    if args.ckpt_step and not any_format and (wrong := incomplete(Path(args.load, step_folder(args.ckpt_step)))):
        raise ValueError(f"ckpt_step: {Path(args.load, step_folder(args.ckpt_step))} {wrong}; newest: {found.folder}")
    return int(args.ckpt_step or found.step)


def check_schedule(args: argparse.Namespace, stored: Mapping[str, Any]) -> str | None:
    """Compares the schedule of a run with that of the checkpoint that it resumes from.

    Upstream refuses every difference by an assertion that names neither the key nor a remedy. Differences that change
    no learning rate and no weight decay, such as the length of a run with a constant rate, are accepted here.

    Args:
        args: the run's arguments; override_opt_param_scheduler is set where upstream may take the new values.
        stored: the arguments of the run that wrote the checkpoint.
    Returns:
        A line to print if the schedules differ without effect; None if they are equal.
    Raises:
        ValueError: naming the key, both values and the remedy.
    """
    if args.no_load_optim or stored.get("no_save_optim"):
        return None
    _check_optimizer(args, stored)
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return None
    changed = [key for key in SCHEDULE if key in stored and _differs(key, args, stored)]
    if not changed:
        return None
    said = ", ".join(f"{key} is {getattr(args, key)} (in the checkpoint {stored[key]})" for key in changed)
    if _effective(vars(args)) == _effective(stored):
        args.override_opt_param_scheduler = True
        return f"{said}: this changes neither the learning rate nor the weight decay of a step"
    raise ValueError(
        f"{said}: this would change the schedule of the run in {args.load} midway; set override_opt_param_scheduler: "
        "true to follow the new schedule from here on, use_checkpoint_opt_param_scheduler: true to keep that of the "
        "checkpoint, or the old values"
    )


def _check_optimizer(args: argparse.Namespace, stored: Mapping[str, Any]) -> None:
    """Raises ValueError if this run's optimizer cannot load the checkpoint's state."""
    now = vars(args)
    changed = [key for key in STATE if key in stored and stored[key] != now[key]]
    if _is_half(stored) != _is_half(now):  # only with half precision does the state have fp32 weights
        changed += [key for key in HALF if stored[key] != now[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{key} is {now[key]}, but the run in {args.load} has {stored[key]}, and the state of its optimizer "
            f"belongs to that: set {key}: {stored[key]} to continue it, or start another run from its weights (another "
            f"save and pretrained_checkpoint: {args.load})"
        )
    by_layout = stored.get("use_distributed_optimizer") and not stored.get("dist_ckpt_optim_fully_reshardable")
    if moved := [key for key in LAYOUT if by_layout and key in stored and stored[key] != now[key]]:
        raise ValueError(
            f"{moved[0]} is {now[moved[0]]}, but the run in {args.load} has {stored[moved[0]]}, and saved its "
            "distributed optimizer for this layout only: continue in that layout, with "
            "dist_ckpt_optim_fully_reshardable: true until its next checkpoint, or set no_load_optim: true to start "
            "from the weights with a new optimizer"
        )
    if EXPERTS in stored and (stored[EXPERTS] > 1) != (now[EXPERTS] > 1):  # megatron-core 0.19.2 ends with a KeyError
        raise ValueError(
            f"{EXPERTS} is {now[EXPERTS]}, but the run in {args.load} has {stored[EXPERTS]}: Megatron has a second "
            f"optimizer for experts only where it is above 1; set it to {stored[EXPERTS]} to continue, or "
            "no_load_optim: true to start from the weights with a new optimizer"
        )


def _is_half(values: Mapping[str, Any]) -> bool | None:
    """Whether a run trains in half precision; None if its arguments do not say."""
    return None if not values.keys() >= set(HALF) else bool(values["bf16"] or values["fp16"])


def changed_model(args: argparse.Namespace, path: str, stored: Mapping[str, Any]) -> list[str]:
    """Warnings if a run computes something else with the weights of a checkpoint than the run that trained them.

    Args:
        path: the folder of the checkpoint.
        stored: the arguments of the run that wrote it.
    Raises:
        ValueError: it is the same run, which resumes.
    """
    now = vars(args)
    names = [name for name in COMPARED.values() if name not in (PATTERN, "num_layers")]
    changed = [name for name in names if name in stored and name in now and stored[name] != now[name]]
    said = [f"{name} is {now[name]}, but the run in {path} has {stored[name]}" for name in changed]
    if said and path == args.load and not args.finetune:
        raise ValueError(f"{said[0]}: set {changed[0]}: {stored[changed[0]]} to continue it")
    return [f"{text}, with which its weights were trained" for text in said]


def changed_data(args: argparse.Namespace, stored: Mapping[str, Any]) -> str | None:
    """A warning if a run that resumes reads its data in another order than before; None otherwise."""
    now = vars(args)
    keys = list(DATA)
    if now.get("sfr_packing") not in (None, "none"):
        keys.append("context_parallel_size")  # to which conversations are padded
    if reorders_documents(now, stored):
        keys += LENGTH
    changed = [key for key in keys if key in stored and _absolute(stored[key]) != _absolute(now[key])]
    if not changed:
        return None
    said = ", ".join(f"{key} is {shown(now[key])} (in the checkpoint {shown(stored[key])})" for key in changed)
    return f"{said}: sequences that were read before may be read again, and others not at all"


def _absolute(value: Any) -> Any:
    """A list of folders, and perhaps weights, with absolute paths; any other value as it is."""
    return [os.path.abspath(str(item)) for item in value] if isinstance(value, list) else value


def check_targets(args: argparse.Namespace, stored: Mapping[str, Any]) -> None:
    """Raises ValueError if a run resumes with targets of another kind than its flow head has learned to predict.

    Args:
        args: with `flow_targets`, as of prepared_check.flow_targets.
    """
    then, now = stored.get("flow_targets"), args.flow_targets
    if not then or not now or then == now:
        return
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    raise ValueError(
        f"the targets have other values of {', '.join(changed)} than those that the flow head in {args.load} was "
        "trained on: prepare and embed the data as before, or start another run with a new head (another save, "
        f"pretrained_checkpoint: {args.load}, sfr_fresh_head: true)"
    )


@contextmanager
def explained(checkpoint: str) -> Iterator[None]:
    """Raises errors of the block, which loads a checkpoint, as `mismatch` explains them."""
    try:
        yield
    except (CheckpointException, ValueError) as error:
        if (clearer := mismatch(error, checkpoint)) is error:
            raise
        raise clearer from error


def mismatch(error: BaseException, checkpoint: str) -> BaseException:
    """The error to raise for torch's CheckpointException, or a ValueError, while a checkpoint is loaded.

    A ValueError in one line if the checkpoint lacks a parameter, has it in another size, or has the optimizer's state
    of other parameters: upstream lists all parameters. Otherwise the given error.
    """
    if isinstance(error, ValueError) and "parameter group" in str(error):
        return ValueError(f"the state of the optimizer in {checkpoint} {_OTHER_PARAMETERS}")
    for failure, _ in getattr(error, "failures", {}).values():
        text = str(failure).strip("\"'")
        name, found, _ = text.partition(" from model not in state dict")
        if found:
            if name.startswith("optimizer."):
                return ValueError(f"the checkpoint in {checkpoint} has no {name}: its optimizer {_OTHER_PARAMETERS}")
            remedy = "add --sfr-fresh-head to start one" if name.startswith("flow_head.") else "it is of another model"
            return ValueError(f"the checkpoint in {checkpoint} has no {name}: {remedy}")
        if sizes := _SIZES.search(text):
            stored, expected, name = sizes.groups()
            return ValueError(
                f"the checkpoint in {checkpoint} has {name} of size [{stored}], and this run's model [{expected}]: set "
                "the sizes (num_layers, hidden_size, ...) that the checkpoint was written with, or another save"
            )
    return error


def _differs(key: str, args: argparse.Namespace, stored: Mapping[str, Any]) -> bool:
    """Whether a key has another value. Upstream sets the length of the decay when a run starts."""
    now, then = getattr(args, key), stored[key]
    length = {"lr_decay_iters": "train_iters", "lr_decay_samples": "train_samples"}.get(key)
    if length is not None and now is None:
        return then not in (None, stored.get(length))
    return bool(now != then)


def _effective(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything that the rates of a step depend on, in samples, as in upstream's get_optimizer_param_scheduler."""
    by_steps = bool(values.get("train_iters")) and not values.get("train_samples")
    unit, batch = ("iters", values["global_batch_size"]) if by_steps else ("samples", 1)
    total = values[f"train_{unit}"] * batch
    decay = (values.get(f"lr_decay_{unit}") or values[f"train_{unit}"]) * batch
    fraction = values.get("lr_warmup_fraction")
    warmup = fraction * decay if fraction is not None else (values.get(f"lr_warmup_{unit}") or 0) * batch
    style, rise = values.get("lr_decay_style"), values.get("weight_decay_incr_style")
    stable = (values.get("lr_wsd_decay_style"), (values.get(f"lr_wsd_decay_{unit}") or 0) * batch)
    return (
        *(style, warmup, None if style == "constant" else decay, stable if style == "WSD" else None),
        *(values.get("start_weight_decay"), values.get("end_weight_decay")),
        None if rise == "constant" else (rise, total),
    )
