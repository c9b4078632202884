"""Checks before a run resumes: the trackers of its checkpoints, and that its schedule is the checkpoint's."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sfr.hf.megatron.tracker import TRACKER, newest
from megatron_sfr.storage.atomic import replacing

SCHEDULE = (
    *("train_iters", "train_samples", "global_batch_size", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
"""Upstream's arguments that make up the schedule of learning rate and weight decay."""
STATE = (
    *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "sfr_head_lr_mult"),
    *("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum"),
)
"""Those that the optimizer's state holds. It cannot be loaded with other rates, and silently keeps its own betas."""
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
        ValueError: a folder has a tracker but no complete checkpoint, or its tracker cannot be written.
    """
    notes = []
    any_format = recipe.get("ckpt_format", "torch_dist") != "torch_dist"
    folders = dict.fromkeys(recipe[key] for key in ("load", "pretrained_checkpoint") if recipe.get(key))
    for folder in (Path(folder) for folder in folders if "://" not in folder):
        found = newest(folder, any_format=any_format)
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


def resumed_step(args: argparse.Namespace) -> int:
    """The step at which a run resumes; 0 for a new run."""
    if args.finetune or not args.load or "://" in args.load:
        return 0
    found = newest(Path(args.load), any_format=args.ckpt_format != "torch_dist")
    if found is None or found.step == 0:
        return 0
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
    for key in STATE:
        if key in stored and stored[key] != getattr(args, key):
            raise ValueError(
                f"{key} is {getattr(args, key)}, but the run in {args.load} has {stored[key]}, and the state of its "
                f"optimizer belongs to that: set {key}: {stored[key]} to continue it, or start another run from "
                f"its weights (another save and pretrained_checkpoint: {args.load})"
            )
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


def mismatch(error: Any, checkpoint: str) -> Exception:
    """The error to raise for torch's CheckpointException while a model is loaded.

    A ValueError in one line if the checkpoint lacks a parameter or has it in another size: upstream lists all
    parameters. Otherwise the given error.
    """
    for failure, _ in error.failures.values():
        text = str(failure).strip("\"'")
        name, found, _ = text.partition(" from model not in state dict")
        if found:
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
