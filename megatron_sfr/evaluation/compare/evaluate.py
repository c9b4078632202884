"""A complete evaluation of models: prints a table and writes five files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.plot import draw
from megatron_sfr.evaluation.compare.replies import Hardware, answers
from megatron_sfr.evaluation.compare.report import Axes, Report, summarise
from megatron_sfr.evaluation.compare.report_html import page, side_by_side
from megatron_sfr.evaluation.compare.tables import as_json, markdown, terminal
from megatron_sfr.evaluation.generate.transformers_engine import record
from megatron_sfr.storage.atomic import whole


def evaluate(
    folders: Mapping[str, Path],
    scorer: Scorer,
    axes: Sequence[Axes],
    output: Path,
    *,
    title: str,
    picture: str,
    hardware: Hardware,
    identity: Mapping[str, object] | None = None,
    show: bool = True,
) -> Report:
    """Samples and scores every model, of which the first is the baseline. Writes the files.

    show: whether to print the table.
    identity: everything that determines the numbers, stored in evaluation.json, which is written last.
    """
    questions = scorer.questions()
    answered = answers(folders, questions, hardware)
    with whole(output / "samples.jsonl") as file:
        for model in answered:
            for options, rows in zip(questions.sweep, model.replies, strict=True):
                for prompt, row in zip(questions.prompts, rows, strict=True):
                    lines = (record(model.model, prompt, options, reply) for reply in row)
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report = summarise([scorer.curve(model) for model in answered], axes, scorer.notes(), scorer.real())
    draw(report, output / picture, title)
    samples = side_by_side(scorer.asked, answered, report.temperatures)
    pages = {
        "report.md": markdown(report, title, picture),
        "report.html": page(report, title, (output / picture).read_bytes(), samples),
    }
    for name, text in pages.items():
        with whole(output / name) as file:
            file.write(text)
    sizes = {name: (output / name).stat().st_size for name in ("samples.jsonl", picture, *pages)}
    with whole(output / "evaluation.json") as file:
        file.write(as_json(report, {"identity": identity, "files": sizes} if identity else {}))
    if show:
        print(terminal(report), flush=True)
    return report
