"""Controls: each arm against the baseline stopped early, which tells less overfitting from more diversity.

An objective that slows training down leaves a model that has learned the text less by heart, and such a model is more
diverse whatever slowed it down. So the baseline is trained once more for each seed, the same steps, keeping its weights
every few steps. An arm is then compared with the baseline of the same seed at two of those steps: where the loss on the
training text equals the arm's, and where the loss on held-out replies does.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.dictionary_styles.study.plan import BASELINE, Arm, Plan, Run
from examples.dictionary_styles.study.verdicts import Verdict
from examples.dictionary_styles.study.work import JUDGING, Place, Task, headwords, megatron_sfr, rows
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE
from megatron_sfr.evaluation.generate.engines import HuggingFace
from megatron_sfr.evaluation.scores.likelihood import negative_log_likelihood
from megatron_sfr.storage.atomic import replacing

EVERY = 5
MEAN_OF = 10  # steps whose training loss is averaged: a step's loss depends on its batch
KINDS = ("training", "held-out")
KEPT = Arm(f"{BASELINE} kept")


@dataclass(frozen=True)
class Stop:
    """Where the baseline is stopped for a run of an arm. losses: the arm's and the baseline's there, nats per token."""

    run: Run
    kind: str
    step: int
    losses: tuple[float, float]

    @property
    def control(self) -> Run:
        """The baseline at this step, a run like any other once its weights are exported into its folder."""
        arm = Arm(f"{BASELINE} at {self.run.arm.name}'s {self.kind} loss", baseline=True)
        return Run(arm, (), self.run.seed, self.step)


@dataclass(frozen=True)
class Controlled:
    """The verdict of an arm against the stopped baseline, and the stop of each seed."""

    verdict: Verdict
    stops: list[Stop]


def kept(plan: Plan, seed: int) -> Run:
    """The baseline's run once more, with a checkpoint every few steps."""
    return Run(KEPT, (("no_save_optim", True), ("save_interval", EVERY)), seed, plan.steps)


def find_stops(run: Run, plan: Plan, place: Place) -> list[Stop]:
    """The two stops for a run of an arm, saved in its folder. Raises ValueError if the kept run's losses differ."""
    path = place.folder(run) / "stops.json"
    if not path.exists():
        source = kept(plan, run.seed)
        losses = _losses(source, place)
        if losses != _losses(Run(plan.find(BASELINE), (), run.seed, plan.steps), place):
            raise ValueError(f"{place.folder(source)} did not train as the baseline did: remove it and run again")
        found = [("training", *training_stop(_losses(run, place), losses))]
        target = held_out_loss(place.folder(run) / "hf", plan, place)
        steps = range(plan.steps - plan.steps % EVERY, EVERY, -EVERY)

        def loss_at(step: int) -> float:
            return held_out_loss(export(step, run.seed, plan, place), plan, place)

        found.append(("held-out", *held_out_stop(target, loss_at, steps)))
        with replacing(path) as file:
            json.dump(found, file)
    return [Stop(run, kind, step, tuple(losses)) for kind, step, losses in json.loads(path.read_text(encoding="utf-8"))]


def training_stop(arm: Sequence[float], baseline: Sequence[float]) -> tuple[int, tuple[float, float]]:
    """The kept step whose mean training loss is nearest to the arm's last, and both losses. arm, baseline: [steps]."""
    target = float(np.mean(arm[-MEAN_OF:]))
    means = {end: float(np.mean(baseline[end - MEAN_OF : end])) for end in range(MEAN_OF, len(baseline) + 1, EVERY)}
    step = min(means, key=lambda step: abs(means[step] - target))
    return step, (target, means[step])


def held_out_stop(
    target: float, loss_at: Callable[[int], float], steps: Iterable[int]
) -> tuple[int, tuple[float, float]]:
    """The first of the steps whose held-out loss is at most the target, else the step with the smallest loss."""
    losses: dict[int, float] = {}
    for step in steps:
        losses[step] = loss_at(step)
        if losses[step] <= target:
            return step, (target, losses[step])
    step = min(losses, key=losses.__getitem__)
    return step, (target, losses[step])


def export(step: int, seed: int, plan: Plan, place: Place) -> Path:
    """The baseline's weights after a step, as a Hugging Face folder."""
    folder = place.folder(kept(plan, seed))
    output = folder / f"hf-{step}"
    if not output.exists():
        words = ("--checkpoint", folder / f"iter_{step:07d}", "--like", place.model, "--output", output)
        merge = ("--merge",) if place.regime.lora else ()
        megatron_sfr(folder / "export.log", "convert", "export", *words, *merge)
    return output


def held_out_loss(model: Path, plan: Plan, place: Place) -> float:
    """Nats per token on the real replies to the headwords that arms are judged by."""
    engine = HuggingFace({model.name: model}, device=place.device)
    conversations = [c for entry in headwords(JUDGING, plan, place) for c in entry.references]
    nll, tokens = negative_log_likelihood(engine.load(model.name, AS_AT_INFERENCE), conversations)
    return float(nll.sum() / tokens.sum())


def place_weights(stop: Stop, plan: Plan, place: Place) -> Task:
    """Copies the stopped baseline's weights to where a trained run has its own. Returns the task that samples it."""
    folder = place.folder(stop.control) / "hf"
    if not folder.exists():
        partial = folder.with_name("hf.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(export(stop.step, stop.run.seed, plan, place), partial)
        partial.rename(folder)
    return Task(stop.control, JUDGING, plan, place)


def _losses(run: Run, place: Place) -> list[float]:
    """Training loss of each step."""
    return [row["lm loss"] for row in rows(place.folder(run) / "metrics.jsonl") if "lm loss" in row]
