"""A whole evaluation: models in, a table on the terminal and four files out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_sfr.evaluation.curves import Scorer, measure
from megatron_sfr.evaluation.plot import draw
from megatron_sfr.evaluation.prompts import Asked
from megatron_sfr.evaluation.report import Axes, Report, summarise
from megatron_sfr.evaluation.sampling import load_model, record
from megatron_sfr.evaluation.tables import as_json, markdown, terminal, whole


def evaluate(
    folders: Mapping[str, Path],
    scorer: Scorer,
    axes: Sequence[Axes],
    output: Path,
    *,
    losses: Mapping[str, Sequence[Asked]],
    title: str,
    picture: str,
    device: str | None = None,
    dtype: str = "auto",
) -> Report:
    """Samples and scores every model, the first being the baseline; prints the table and writes it with the picture."""
    options = scorer.options
    total = len(folders) * len(scorer.asked) * options.sampling.samples * len(options.temperatures)
    curves = []
    with whole(output / "samples.jsonl") as file, tqdm(total=total, unit="reply", dynamic_ncols=True) as bar:
        for name, folder in folders.items():
            bar.set_description(name)
            curve, replies = measure(load_model(name, folder, device=device, dtype=dtype), scorer, losses, bar)
            curves.append(curve)
            for sampling, rows in replies:
                for entry, row in zip(scorer.asked, rows, strict=True):
                    for reply in row:
                        line = record(name, entry.prompt, sampling, reply)
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    report = summarise(curves, axes, scorer.notes())
    for name, text in (("evaluation.json", as_json(report)), ("report.md", markdown(report, title, picture))):
        with whole(output / name) as file:
            file.write(text)
    draw(report, output / picture, title)
    print(terminal(report), flush=True)
    return report
