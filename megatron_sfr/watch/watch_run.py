"""The loop of `watch`: scores the checkpoints of a run one after another, as they appear."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from megatron_sfr.evaluation.scores.metrics import metric
from megatron_sfr.storage.lock import hold
from megatron_sfr.watch.run_folder import RunFolder
from megatron_sfr.watch.step_scores import StepScorer
from megatron_sfr.watch.watch_log import PAGE, EventFile, StepScores, WatchLog
from megatron_sfr.watch.watch_page import Watched, page, shown_steps

POLL_S = 10.0
_EXPORT = ".export"


def watch(
    run: RunFolder,
    output: Path,
    events: Path,
    scorer: StepScorer,
    identity: Mapping[str, object],
    *,
    once: bool = False,
    say: Callable[[str], None] = print,
    poll_s: float = POLL_S,
) -> None:
    """Scores each complete checkpoint once, oldest first, until the run has its last step.

    Args:
        output: the folder to write.
        events: the folder of the event files, which no other program writes.
        identity: everything that determines the scores of a checkpoint.
        once: score the checkpoints that are there, and end.
        say: gets a line for each checkpoint.
        poll_s: seconds between two looks at the run's folder.
    Raises:
        ValueError: another process watches into this output, or a checkpoint cannot be scored.
    """
    with hold(output, inside=True), hold(events, inside=True) if events.parent != output else nullcontext():
        _remove_export(output)
        log = WatchLog(output, identity)
        with EventFile(events) as scalars:
            scalars.update(log.steps)
            while True:
                for step in run.new_steps(log.known):
                    if scores := _score(run, step, output, log, scorer, say):
                        log.add(scores)
                        scalars.update(log.steps)
                if once or _has_ended(run, log):
                    break
                time.sleep(poll_s)
    scored = f"{len(log.steps)} checkpoints are scored" if log.steps else f"{run.folder} has no complete checkpoint yet"
    say(f"{scored}: {output / PAGE}" if log.steps else scored)


def _score(
    run: RunFolder, step: int, output: Path, log: WatchLog, scorer: StepScorer, say: Callable[[str], None]
) -> StepScores | None:
    """Scores a checkpoint and writes its replies and the page. None if it was deleted or replaced meanwhile."""
    began, saved_at, model = time.monotonic(), run.saved_at(step), output / _EXPORT / f"step_{step}"
    try:
        model.parent.mkdir()
        try:
            run.export(step, model)
        except (ValueError, OSError):
            if run.saved_at(step) == saved_at is not None:
                raise
        if saved_at is None or run.saved_at(step) != saved_at:
            say(f"step {step}: the checkpoint was deleted or replaced while it was read; skipped")
            return None
        try:
            replies = scorer.sample(model)
        except ValueError as error:
            raise ValueError(f"step {step}: {error}") from error
    finally:
        _remove_export(output)
    found = scorer.scores(replies)
    scores = StepScores(
        step=step,
        saved_at=saved_at,
        time=round(time.time(), 3),
        replies=sum(map(len, replies)),
        scores={name: value.mean for name, value in found.items()},
        intervals={name: [value.low, value.high] for name, value in found.items()},
    )
    log.write_replies(step, scorer.asked, replies, scorer.options.sampling)
    log.write_page(page(_watched(run, log, scores, scorer)))
    shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.scores.items() if not metric(name).detail)
    say(f"step {step}: {scores.replies} replies in {time.monotonic() - began:.0f} s: {shown}")
    return scores


def _watched(run: RunFolder, log: WatchLog, scores: StepScores, scorer: StepScorer) -> Watched:
    """What the page shows once a step is scored."""
    steps, sampling = log.with_step(scores), scorer.options.sampling
    shown = shown_steps([step for step in steps if log.replies_of(step).is_file()])
    return Watched(
        run=run.folder.resolve().name,
        steps=steps,
        real=scorer.real,
        asked=scorer.asked,
        replies={step: log.read_replies(step, sampling.samples) for step in shown},
        sampling=f"{sampling.samples} replies to each at temperature {sampling.temperature:g}",
    )


def _has_ended(run: RunFolder, log: WatchLog) -> bool:
    """Whether the checkpoint of the run's last step is scored."""
    there = [step for step, at in log.known.items() if run.saved_at(step) == at]
    last = run.last_step(max(there)) if there else None
    return last is not None and max(there) >= last


def _remove_export(output: Path) -> None:
    """Removes the exported weights, also those that a killed process has left."""
    shutil.rmtree(output / _EXPORT, ignore_errors=True)
