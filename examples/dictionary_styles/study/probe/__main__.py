"""Probes the start, the arms and the stopped baseline of a finished study, and prints tables of what differs."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.dictionary_styles.study import controls
from examples.dictionary_styles.study.plan import ARMS, BASELINE, REGIMES, Plan, choose_arms, fixed, judged
from examples.dictionary_styles.study.probe.measures import START, difference, estimate, measures, relations
from examples.dictionary_styles.study.probe.states import anchored_targets, prepared_replies, states_of
from examples.dictionary_styles.study.work import Place
from megatron_sfr.evaluation.compare.tables import markdown_table
from megatron_sfr.storage.atomic import replacing

FIXED = {regime.name: regime for regime in REGIMES if regime.settings is not None}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="probe", description=__doc__)
    parser.add_argument("--start", type=Path, metavar="HF_DIR", help="the model that the study began from")
    parser.add_argument("--regime", choices=list(FIXED), required=True)
    parser.add_argument("--arm", choices=[a.name for a in ARMS if a.name != BASELINE], default="SFR")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Plan().seeds), help="default: %(default)s")
    parser.add_argument("--headwords", type=int, default=140, help="at most, on each side (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        regime = FIXED[args.regime]
        amounts = {"steps": regime.steps, "headwords": args.headwords}
        plan = Plan(seeds=tuple(args.seeds), arms=choose_arms([args.arm]), regime=regime, **amounts)
        print("\n".join(probe(plan, Place(start=args.start, regime=regime), args.arm)))
    except (ValueError, OSError) as error:
        print(f"probe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def probe(plan: Plan, place: Place, arm: str) -> list[str]:
    """The tables as lines of Markdown, also written to probe.md; probe.json has the values of each seed."""
    models = model_folders(plan, place, arm)
    folder = place.study / f"probe-words{plan.headwords}"
    data, at = prepared_replies(plan, place, folder)
    futures = anchored_targets(data)
    bar = tqdm(total=sum(map(len, models.values())), desc="probes", unit="model")
    h: dict[str, list[np.ndarray]] = {}
    values: dict[str, list[dict[str, np.ndarray]]] = {}
    for name, seeds in models.items():
        for model in seeds:
            stem = START if name == START else model.parent.name
            h.setdefault(name, []).append(states_of(model, data, folder / f"{stem}.npy"))
            values.setdefault(name, []).append(measures(h[name][-1], at, futures))
            bar.update()
    bar.close()
    most = np.bincount(at.persona).max() / len(at.persona)
    anchors = ", ".join(f"{len(index):,} anchors of {name}" for name, (index, _) in futures.items())
    lines = [
        f"{len(data)} replies to {len(at.quarter)} headwords, {len(at.headword):,} positions; {anchors}.",
        f"The most frequent persona has {most:.3f} of the positions.",
        "",
        *markdown_table(levels(values)),
    ]
    for baseline in (name for name in models if name not in (START, arm)):
        lines += [
            "",
            *markdown_table(comparison(values[arm], values[baseline], f"{arm} minus {baseline}", len(at.quarter))),
        ]
    lines += ["", *markdown_table(relations(h, at, arm))]
    content = {name: [{key: v[0] for key, v in seed.items()} for seed in seeds] for name, seeds in values.items()}
    for path, text in (("probe.md", "\n".join(lines) + "\n"), ("probe.json", json.dumps(content, indent=1))):
        with replacing(folder / path) as file:
            file.write(text)
    return lines


def model_folders(plan: Plan, place: Place, arm: str) -> dict[str, list[Path]]:
    """The Hugging Face folders of each model, one per seed. ValueError if one is missing.

    With the baseline stopped where its training loss equals the arm's, if the study ran with --controls.
    """
    runs = judged(plan, fixed(plan) or {})
    stopped = [run for run in runs if run.arm.name == arm and (place.folder(run) / "stops.json").exists()]
    stops = [s.control for run in stopped for s in controls.find_stops(run, plan, place) if s.kind == "training"]
    baselines = [run for run in runs if run.arm.name == BASELINE]
    found = {START: [place.base]}
    for run in (*baselines, *stops, *(run for run in runs if run.arm.name == arm)):
        found.setdefault(run.arm.name, []).append(place.folder(run) / "hf")
    if missing := [folder for folders in found.values() for folder in folders if not folder.exists()]:
        raise ValueError(f"{missing[0]} is missing: run the study first (docs/study.md)")
    return found


Values = list[dict[str, np.ndarray]]  # a seed's measures by name


def levels(values: Mapping[str, Values]) -> list[list[str]]:
    """Every measure of every model, mean over seeds."""
    names = values[START][0]
    cells = {m: [estimate(np.mean([seed[m] for seed in seeds], axis=0)) for seeds in values.values()] for m in names}
    return [["measure", *values], *([name, *row] for name, row in cells.items())]


def comparison(arm: Values, baseline: Values, title: str, headwords: int) -> list[list[str]]:
    table = [[title, "difference", "seed by seed", "two seeds of the baseline", "beyond noise"]]
    for name in arm[0]:
        d = difference(*(np.stack([seed[name] for seed in seeds]) for seeds in (arm, baseline)), headwords)
        table.append([name, d.gap, d.seeds, f"{d.noise:.3f}", "yes" if d.moved else "no"])
    return table


if __name__ == "__main__":
    sys.exit(main())
