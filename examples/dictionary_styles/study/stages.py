"""The study from materials to pages, stage by stage; each stage resumes an earlier call.

Training and sampling need no encoder and no network, and may run on another machine than the rest (`--stages`).
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from examples.dictionary_styles.study import choice, controls, cost, materials, page
from examples.dictionary_styles.study.plan import (
    ARMS,
    AXES,
    BASELINE,
    REGIMES,
    WIDE,
    Plan,
    Run,
    Settings,
    candidates,
    choose_arms,
    fixed,
    judged,
)
from examples.dictionary_styles.study.verdicts import Verdict, compare
from examples.dictionary_styles.study.work import CHOOSING, JUDGING, STAGES, Place, Task, finish, read_curve
from megatron_sfr.evaluation.compare.curves import Curve
from megatron_sfr.runtime.lifetime import end_with_parent

DESCRIPTION = "Start or resume the study, and write its pages."

Curves = dict[str, list[Curve]]  # arm -> one a seed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="study", description=DESCRIPTION)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(plan.seeds), help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"only these of {' '.join(a.name for a in plan.arms)}")
    regimes = "; ".join(f"{r.name}: {r.per_persona} replies per persona, {r.steps} steps" for r in REGIMES)
    parser.add_argument(
        "--regime", choices=[r.name for r in REGIMES], default=WIDE.name, help=f"{regimes} (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="of each arm (default: the regime's)")
    parser.add_argument("--headwords", type=int, default=plan.headwords, help="at most, on each side (%(default)s)")
    parser.add_argument("--samples", type=int, default=plan.samples, help="replies per prompt (default: %(default)s)")
    parser.add_argument("--start", type=Path, metavar="HF_DIR", help="the model to begin from (a small one, made here)")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="over the arms' recipes, as study/gpu.yaml")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, help="runs side by side (default: one a core, on cuda one)")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="only these here, the others on another machine",
    )
    parser.add_argument(
        "--controls", action="store_true", help="compare each arm with the baseline stopped at equal losses, too"
    )
    parser.add_argument("--skip-cost", action="store_true", help="do not time the arms' steps (needs a quiet machine)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many runs as cores instead
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported: ours has a bar, the workers' have none
    try:
        if args.controls and set(args.stages) != set(STAGES):
            raise ValueError("--controls needs all stages: leave --stages out")
        arms = choose_arms(args.arms) if args.arms else ARMS
        regime = next(regime for regime in REGIMES if regime.name == args.regime)
        steps = regime.steps if args.steps is None else args.steps
        amounts = {"steps": steps, "samples": args.samples, "headwords": args.headwords}
        plan = Plan(seeds=tuple(args.seeds), arms=arms, regime=regime, **amounts)
        place = Place(start=args.start, recipe=args.recipe, device=args.device, regime=regime)
        processes = args.processes or (1 if args.device == "cuda" else os.cpu_count() or 1)
        timed = not args.skip_cost and "train" in args.stages
        study(plan, place, processes, tuple(args.stages), controlled=args.controls, timed=timed)
    except (ValueError, OSError) as error:
        print(f"study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstudy: stopped; the same command resumes it", file=sys.stderr)
        return 130
    return 0


def study(plan: Plan, place: Place, processes: int, stages: tuple[str, ...], *, controlled: bool, timed: bool) -> None:
    """Runs these stages of the study. Results of earlier calls are kept."""
    materials.claim(place, stages)
    if "materials" in stages:
        materials.prepare(place)
    if not {"train", "sample", "score"} & {*stages}:
        print(f"materials in {place.root}: done; next: --stages train sample")
        return
    materials.check(place, stages)
    settings, tried = settings_of(plan, place, processes, stages)
    runs = judged(plan, settings)
    work((Task(run, JUDGING, plan, place, stages) for run in runs), processes, "runs")
    again = replace(plan, sampling_seed=plan.sampling_seed + 1)
    if "score" not in stages:
        if "sample" in stages:  # scores may ask for it when the models are gone
            work((Task(run, JUDGING, again, place, stages) for run in runs), processes, "sampled again")
        print(f"{len(runs)} runs in {place.study}: {' and '.join(stages)} done; next: --stages score")
        return
    curves = read(runs, plan, place)
    verdicts = verdicts_of(curves)
    names = {verdict.arm for verdict in verdicts if verdict.moved}
    repeated: list[Verdict] = []
    if names:  # a difference counts if other replies show it again
        some = [run for run in runs if run.arm.name in names | {BASELINE}]
        work((Task(run, JUDGING, again, place, stages) for run in some), processes, "sampled again")
        repeated = verdicts_of(read(some, again, place))
    controls_found = control(runs, curves, plan, place, processes) if controlled else []
    costs = cost.measure(runs[: len(plan.arms)], place) if timed else cost.known(place)
    found = page.Found(plan, settings, tried, curves, verdicts, repeated, costs, controls_found)
    page.write(found, place)
    print(f"{page.summary(found)}\n\nwrote {place.study / 'study.html'} and study.md beside it")


def settings_of(
    plan: Plan, place: Place, processes: int, stages: tuple[str, ...]
) -> tuple[dict[str, Settings], choice.Table]:
    """The settings of each arm, fixed by the regime or chosen on other headwords, and the table of the choice."""
    threshold = materials.sed_threshold(place) if any(arm.name == "SED" for arm in plan.arms) else None
    if (known := fixed(plan)) is not None:
        return choice.with_threshold(known, threshold), {}
    tasks = [Task(run, CHOOSING, plan, place, stages) for run in candidates(plan)]
    work(tasks, processes, "settings")
    if not all(task.curve.exists() for task in tasks):
        raise ValueError("settings are chosen by scores: run without --stages once, or in a regime that fixes them")
    return choice.choose(plan, place, threshold)


def control(runs: Sequence[Run], curves: Curves, plan: Plan, place: Place, processes: int) -> list[controls.Controlled]:
    """Each arm against the baseline stopped at the arm's losses, on both pairs of axes."""
    others = [run for run in runs if run.arm.name != BASELINE]
    sources = [controls.kept(plan, seed) for seed in plan.seeds]
    work((Task(run, JUDGING, plan, place, ("train",)) for run in sources), processes, "baseline, kept")
    stops = [stop for run in tqdm(others, desc="stops", unit="run") for stop in controls.find_stops(run, plan, place)]
    work([controls.place_weights(stop, plan, place) for stop in stops], processes, "controls")
    found = []
    for arm in dict.fromkeys(run.arm.name for run in others):
        for kind in controls.KINDS:
            some = [stop for stop in stops if (stop.run.arm.name, stop.kind) == (arm, kind)]
            (stopped,) = read([stop.control for stop in some], plan, place).values()
            found += [controls.Controlled(compare(arm, curves[arm], stopped, axes), some) for axes in AXES]
    return found


def work(tasks: Iterable[Task], processes: int, title: str) -> None:
    """Runs the tasks that are not done, in parallel processes of one thread each."""
    missing = [task for task in tasks if not task.is_done]
    if not missing:
        return
    spawn = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with (
        ProcessPoolExecutor(min(processes, len(missing)), spawn, _begin) as pool,
        tqdm(total=len(missing), desc=title, unit="run", dynamic_ncols=True) as bar,
    ):
        futures = [pool.submit(finish, task) for task in missing]
        try:
            for future in as_completed(futures):
                bar.set_postfix_str(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """Initializes a worker: it ends with the study, and Ctrl-C ends it without a traceback."""
    import torch

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def read(runs: Iterable[Run], plan: Plan, place: Place) -> Curves:
    curves: Curves = {}
    for run in runs:
        curve = read_curve(place.curve(run, JUDGING, plan), run.name, plan.sweep(run.arm, judging=True))
        curves.setdefault(run.arm.name, []).append(curve)
    return curves


def verdicts_of(curves: Curves) -> list[Verdict]:
    """Every arm against the baseline on every pair of axes."""
    arms = [arm for arm in curves if arm != BASELINE]
    return [compare(arm, curves[arm], curves[BASELINE], axes) for arm in arms for axes in AXES]
