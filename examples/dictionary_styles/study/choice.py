"""Which setting of an arm is judged: the one whose frontier lies highest on the headwords set apart for choosing."""

import json
import math
from collections.abc import Mapping

from examples.dictionary_styles.study.plan import AXES, BASELINE, CHOOSING_SEED, Plan, Settings, candidates
from examples.dictionary_styles.study.verdicts import mean_gap
from examples.dictionary_styles.study.work import CHOOSING, Place, read_curve
from megatron_sfr.evaluation.compare.curves import Curve
from megatron_sfr.storage.atomic import replacing

Table = dict[str, list[dict[str, object]]]


def choose(plan: Plan, place: Place, sed_threshold: float | None) -> tuple[dict[str, Settings], Table]:
    """The settings of each arm, and a table with the gains of every setting that was tried.

    The setting with the largest sum of gaps to the baseline is chosen; of equal ones, the first. A gap without a value
    counts as 0.
    """
    curves = [
        (run, read_curve(place.curve(run, CHOOSING, plan), run.name, plan.temperatures)) for run in candidates(plan)
    ]
    chosen: dict[str, Settings] = {arm.name: arm.tried[0] for arm in plan.arms}
    table: Table = {}
    for arm in plan.arms:
        baseline = next((curve for run, curve in curves if run.arm.name == BASELINE), None)
        runs = [(run, curve) for run, curve in curves if run.arm == arm and arm.name != BASELINE]
        scored = [(run, gains(curve, baseline)) for run, curve in runs if baseline is not None]
        if scored:
            best = max(scored, key=lambda found: sum(found[1].values()))[0]
            chosen[arm.name] = dict(best.settings)
            table[arm.name] = [{"settings": dict(run.settings), "gains": g, "chosen": run == best} for run, g in scored]
    chosen = with_threshold(chosen, sed_threshold)
    content = {"seed": CHOOSING_SEED, "chosen": chosen, "tried": table}
    with replacing(place.study / "choice.json") as file:
        json.dump(content, file, indent=1)
    return chosen, table


def with_threshold(chosen: Mapping[str, Settings], sed_threshold: float | None) -> dict[str, Settings]:
    """The settings with SED's threshold, which is calibrated on the start. None: SED is not an arm."""
    more = {} if sed_threshold is None else {"SED": {**chosen.get("SED", {}), "sed_threshold": sed_threshold}}
    return {**chosen, **more}


def gains(curve: Curve, baseline: Curve) -> Mapping[str, float]:
    """The gap on each pair of axes; 0 where the curves share no quality."""
    found = {f"{axes.label} at equal {axes.quality}": mean_gap(axes, [curve], [baseline]) for axes in AXES}
    return {name: 0.0 if math.isnan(value) else value for name, value in found.items()}
