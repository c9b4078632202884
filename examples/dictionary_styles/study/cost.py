"""The cost of a step of each arm: the median time of a step in short runs, one after the other."""

import itertools
import json
import shutil
import statistics
from collections.abc import Sequence

from tqdm import tqdm

from examples.dictionary_styles.study.plan import Run
from examples.dictionary_styles.study.work import Place, megatron_sfr, rows
from megatron_sfr.storage.atomic import replacing

STEPS, WARM = 25, 5
# From the second step on all that an arm does in its long run: the head's gradient reaches the model, and is measured.
SHORT = ("--train-iters", STEPS, "--lr-warmup-iters", 1, "--eval-iters", 0, "--save-interval", 10**6)
HEAD = ("--sfr-warmup-steps", 1, "--sfr-ramp-steps", 1)

Costs = dict[str, list[float]]  # arm -> seconds of each step that counts


def known(place: Place) -> Costs:
    """The times that an earlier call measured; empty if there are none."""
    path = place.study / "cost.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure(runs: Sequence[Run], place: Place) -> Costs:
    """Times of each arm's steps, from one run per arm, or those that an earlier call measured."""
    if costs := known(place):
        return costs
    for run in tqdm(runs, desc="cost of a step", unit="arm"):
        folder = place.study / "cost" / run.name
        shutil.rmtree(folder, ignore_errors=True)
        head = HEAD if run.arm.recipe is not None and "sfr" in run.arm.recipe else ()
        megatron_sfr(place.study / "logs" / "cost.log", "train", *place.training(run, folder), *SHORT, *head)
        times = [row["time"] for row in rows(folder / "metrics.jsonl") if "lm loss" in row]
        costs[run.arm.name] = [after - before for before, after in itertools.pairwise(times)][WARM:]
    with replacing(place.study / "cost.json") as file:
        json.dump(costs, file)
    return costs


def table(costs: Costs) -> list[list[str]]:
    """Median and quartiles of each arm's step, and the ratio of its median to the first arm's."""
    base = statistics.median(next(iter(costs.values())))
    lines = [["arm", "ms a step", "quartiles", "ratio to the baseline"]]
    for arm, seconds in costs.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        lines.append([arm, f"{1e3 * middle:.0f}", f"{1e3 * low:.0f} to {1e3 * high:.0f}", f"{middle / base:.3f}"])
    return lines
