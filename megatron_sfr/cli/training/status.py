"""Show where a run is, from its folder alone, while it runs or after: step, checkpoint, losses, speed, time left.

Reads SAVE/recipe.yaml, metrics.jsonl, failures.jsonl, the checkpoints, the lock and the newest log. Imports neither
torch nor Megatron.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL = 1 << 22
"""Bytes of metrics.jsonl that are read, from its end."""
SPEED = "speed/"
LOSSES = ("loss", "token entropy", "token accuracy", "norm", "learning-rate", "sfr ")
"""Parts of the names of what is shown as losses."""
VALIDATION = " validation"
FIRST = ("lm loss", "kl-flow loss", "sfr loss")


@dataclass(frozen=True)
class Status:
    """Where a run is."""

    run: str
    state: str
    """training, finished, failed or stopped."""
    process: str | None
    """The process that trains."""
    step: int
    train_iters: int | None
    last_record: float | None
    """When the last step was logged, in seconds since 1970."""
    checkpoint: str | None
    """The newest complete checkpoint."""
    checkpoint_step: int | None
    note: str | None
    """What is wrong with the checkpoints."""
    seconds_left: float | None
    """As estimated at the last step, less the time since then."""
    losses: dict[str, float]
    validation: dict[str, float]
    """The last metrics of the validation data, and their step."""
    speed: dict[str, float]
    error: str | None
    """Why the run failed, if it did."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder that the recipe's `save` names")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    status = read_status(args.folder, time.time())
    print(json.dumps(asdict(status), indent=1) if args.json else "\n".join(lines(status, time.time())))
    return 0


def read_status(folder: Path, now: float) -> Status:
    """The status of a run. Raises ValueError if the folder is not that of a run."""
    from megatron_sfr.config.recipe import read_recipe
    from megatron_sfr.hf.megatron.tracker import newest
    from megatron_sfr.storage.lock import holder

    recipe_file, metrics = folder / "recipe.yaml", folder / "metrics.jsonl"
    if not recipe_file.is_file():
        raise ValueError(
            f"{folder} is not the folder of a run (no recipe.yaml, which a run writes when it starts): "
            "give the one that the recipe saves to"
        )
    recipe = read_recipe(recipe_file)
    records = list(last_records(metrics))
    last = next((record for record in records if record.keys() & set(FIRST)), {})
    validated = next((record for record in records if any(VALIDATION in name for name in record)), {})
    note, found = None, None
    try:
        found = newest(folder, any_format=recipe.get("ckpt-format", "torch_dist") != "torch_dist")
        note = found.note if found else None
    except ValueError as broken:
        note = str(broken)
    total = _total(recipe)
    step = max(last.get("step", 0), found.step if found else 0)
    process = holder(folder, inside=True)
    error = None
    if process is not None:
        state = "training"
    elif total is not None and found is not None and found.step >= total:
        state = "finished"
    else:
        error = _error(folder, last.get("time", 0.0))
        state = "failed" if error else "stopped"
    left = last.get(f"{SPEED}seconds left")
    return Status(
        run=str(folder),
        state=state,
        process=process,
        step=step,
        train_iters=total,
        last_record=last.get("time"),
        checkpoint=str(found.folder) if found else None,
        checkpoint_step=found.step if found else None,
        note=note,
        seconds_left=max(0.0, left - (now - last["time"])) if process and left is not None else None,
        losses={name: x for name, x in last.items() if _is_loss(name)},
        validation={name: x for name, x in validated.items() if name == "step" or (VALIDATION in name and _plain(x))},
        speed={name.removeprefix(SPEED): x for name, x in last.items() if name.startswith(SPEED)}
        | {name: x for name, x in last.items() if name == "target wait"},
        error=error,
    )


def last_records(metrics: Path) -> Iterator[dict[str, Any]]:
    """The records at the end of a file of metrics, the last one first. Other lines are skipped."""
    from megatron_sfr.storage.user_files import has_type, parse_json

    if not metrics.is_file():
        return
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        text = file.read()
    for line in reversed(text[: text.rfind(b"\n") + 1].splitlines()):
        try:
            record = parse_json(line)
        except ValueError:  # the first line, of which only the end was read
            continue
        if isinstance(record, dict) and has_type(record.get("step"), int) and has_type(record.get("time"), float):
            yield record


def _total(recipe: dict[str, Any]) -> int | None:
    """Steps of a run with this resolved recipe."""
    if isinstance(recipe.get("train-iters"), int):
        return int(recipe["train-iters"])
    samples, batch = recipe.get("train-samples"), recipe.get("global-batch-size", recipe.get("micro-batch-size"))
    return samples // batch if isinstance(samples, int) and isinstance(batch, int) else None


def _error(folder: Path, last_record: float) -> str | None:
    """Why the run failed: by the newest log of `megatron-sfr train`, what a rank recorded, or the lock it left.

    A log counts unless steps were logged, or a rank failed, after its end. What started before the run last finished
    or was stopped does not count. The name of a log has its start in local time, so a log may be taken for an older or
    newer one where status runs in another time zone.
    """
    from megatron_sfr.runtime.failures import first_recorded, last_end, recorded_failure
    from megatron_sfr.storage.lock import killed_holder
    from megatron_sfr.train import ERROR, LOG

    ended, recorded = last_end(folder), first_recorded(folder)
    older = time.strftime(LOG, time.localtime(ended))
    logs = sorted(log for log in (folder / "logs").glob("train-*.log") if log.name > older)
    newest = max(last_record, recorded[1] if recorded else 0.0)
    if logs and logs[-1].stat().st_mtime >= newest - 1 and (found := recorded_failure(logs[-1], ERROR)):
        return found
    if recorded:
        return recorded[0]
    killed = killed_holder(folder, inside=True, since=ended)
    return f"training failed: {killed} was killed; see the log of the job" if killed else None


def _plain(x: Any) -> bool:
    return isinstance(x, int | float)


def _is_loss(name: str) -> bool:
    return any(part in name for part in LOSSES) and VALIDATION not in name and not name.startswith(SPEED)


def lines(status: Status, now: float) -> Iterator[str]:
    """The status as text for one screen."""
    yield f"{status.run}: {status.state}" + (f", {status.process}" if status.process else "")
    total, share = status.train_iters, ""
    if total:
        share = f" of {total:,} ({status.step / total:.0%})"
    ago = f", logged {duration(now - status.last_record)} ago" if status.last_record is not None else ""
    yield f"step        {status.step:,}{share}{ago}"
    checkpoint = f"{status.checkpoint}, complete" if status.checkpoint else "none that is complete"
    yield f"checkpoint  {checkpoint}" + (f"; {status.note}" if status.note else "")
    if status.seconds_left is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + status.seconds_left))
        yield f"time left   {duration(status.seconds_left)}, until {end}"
    if speed := status.speed:
        yield "speed       " + ", ".join(_speed(speed))
    if status.losses:
        names = sorted(status.losses, key=lambda name: (name not in FIRST, name))
        yield "losses      " + ", ".join(f"{name} {status.losses[name]:.4g}" for name in names)
    if values := {name: x for name, x in status.validation.items() if name != "step"}:
        shown = ", ".join(f"{name} {x:.4g}" for name, x in list(values.items())[:8])
        yield f"validation  at step {status.validation['step']:.0f}: {shown}"
    if status.error:
        yield f"error       {status.error}"


def _speed(speed: dict[str, float]) -> Iterator[str]:
    forms = {
        "tokens per second": "{:,.0f} tokens/s",
        "tokens per second per GPU": "{:,.0f} per GPU",
        "TFLOPs per second per GPU": "{:.3g} TFLOP/s per GPU",
        "MFU": "MFU {:.1%}",
        "step seconds": "{:.3g} s a step",
        "data wait ms": "data wait {:.3g} ms",
        "target wait": "target wait {:.3g} ms",
        "peak memory GB": "peak memory {:.3g} GB",
    }
    return (form.format(speed[name]) for name, form in forms.items() if name in speed)


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    seconds = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"
