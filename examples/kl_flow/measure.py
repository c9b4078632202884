"""Compares texts of a denoiser with those of an autoregressive model of its size and with real text.

Run python -m examples.kl_flow.measure after both models and a judge are trained. It measures the entropy of n-grams,
the judge's perplexity, and how often a function with a filled gap is valid Python, and writes Markdown, JSON and HTML.
The same command resumes a stopped run.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from examples.stdlib_cpt.corpus import texts
from megatron_sfr import html
from megatron_sfr.evaluation.compare.tables import markdown_table
from megatron_sfr.evaluation.generate.transformers_engine import Model, load_model
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.runtime.backend import choose
from megatron_sfr.storage.atomic import replacing

from . import scores
from .gaps import Gap, gaps, is_python, text_rows
from .pieces import Asked, Folder, Plan, sampled

Table = dict[str, dict[str, Estimate]]  # writer: score: value
REAL = "real text"
NOTES = (
    "Entropies in nats: within is a text's own n-grams, mean over texts; over all is of all texts' n-grams together, "
    "which grows with their number. In [ ] 95 % bootstrap intervals over texts and gaps; they cover no training seeds.",
    "The judge is an autoregressive model of the baseline's size and data, but another seed. Texts of the "
    "autoregressive model are given the first token of a held-out text; no first token is judged.",
    "valid: the held-out function, its gap filled, is one statement that Python's compiler takes. same: every "
    "token of the gap is the original one. The autoregressive model sees what is before the gap and the gap's length, "
    "KL-flow sees both sides.",
)


def of_texts(rows: Sequence[Sequence[int]], judge: Model) -> dict[str, Estimate]:
    """All scores of a set of texts."""
    found = {f"{name} entropy, within": scores.entropy_within(rows, n) for n, name in ((1, "unigram"), (2, "bigram"))}
    found |= {
        f"{name} entropy, over all": scores.entropy_over_all(rows, n) for n, name in ((1, "unigram"), (2, "bigram"))
    }
    return found | {"judge's perplexity": scores.perplexity(scores.losses(judge, rows))}


def of_gaps(asked: Sequence[Gap], found: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, Estimate]:
    """All scores of the tokens that fill the gaps."""
    pairs = list(zip(asked, found, strict=True))
    valid = [is_python(tokenizer.decode(gap.filled(tokens)), gap.nested) for gap, tokens in pairs]
    same = [tuple(tokens) == gap.tokens[gap.start : gap.stop] for gap, tokens in pairs]
    return {"valid": estimate(np.array(valid, dtype=float)), "same": estimate(np.array(same, dtype=float))}


def references(asked: Sequence[Gap]) -> dict[str, list[tuple[int, ...]]]:
    """Fills of the gaps without a model: the original lines, nothing, and the lines of another gap."""
    real = [gap.tokens[gap.start : gap.stop] for gap in asked]
    return {REAL: real, "nothing": [()] * len(real), "another gap's lines": [*real[1:], real[0]]}


def shuffled(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of all texts in random order, as a model of frequencies would write. The texts have one length."""
    tokens = [token for row in rows for token in row]
    random.Random(0).shuffle(tokens)
    return [tokens[i : i + len(rows[0])] for i in range(0, len(tokens), len(rows[0]))]


def measure(root: Path, output: Path, plan: Plan) -> tuple[Table, Table]:
    """The scores of texts and of gaps, by writer."""
    backend = choose("auto")
    judge = load_model("judge", root / "judge-hf")
    run = Checkpoint(find_checkpoint(root / "kl_flow")).arguments()
    length = run["seq_length"] - (run["kl_flow_time"] == "token")
    modules = list(texts(root / "validation.jsonl"))
    real = text_rows(modules, judge.tokenizer, length, plan.texts)
    asked = Asked(length, tuple(row[0] for row in real), tuple(gaps(modules, judge.tokenizer, length, plan.gaps)))
    by_text: Table = {REAL: of_texts(real, judge), "its tokens, shuffled": of_texts(shuffled(real), judge)}
    by_gap: Table = {name: of_gaps(asked.gaps, rows, judge.tokenizer) for name, rows in references(asked.gaps).items()}
    for kind, name, rows in sampled(
        Folder(output / "pieces"), plan, asked, root / "kl_flow", root / "autoregressive-hf", backend
    ):
        if kind == "texts":
            by_text[name] = of_texts(rows, judge)
        else:
            by_gap[name] = of_gaps(asked.gaps, rows, judge.tokenizer)
    return by_text, by_gap


def cells(table: Table) -> list[list[str]]:
    """Cells of a table. The head names n, the number of texts or gaps."""
    first = next(iter(table.values()))
    head = ["", *(f"{name} (n={value.n})" for name, value in first.items())]
    return [head, *([name, *map(str, row.values())] for name, row in table.items())]


def markdown(tables: Mapping[str, Table]) -> str:
    lines: list[str] = []
    for title, table in tables.items():
        lines += [f"## {title}", "", *markdown_table(cells(table)), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in NOTES)])


def publish(output: Path, plan: Plan, tables: Mapping[str, Table]) -> None:
    """Writes measure.md, measure.json and measure.html."""
    with replacing(output / "measure.md") as file:
        file.write(markdown(tables))
    numbers = {t: {name: {k: asdict(v) for k, v in row.items()} for name, row in x.items()} for t, x in tables.items()}
    with replacing(output / "measure.json") as file:
        json.dump({"plan": asdict(plan), "tables": numbers, "notes": NOTES}, file, indent=1)
    parts = [part for title, table in tables.items() for part in (html.heading(title), html.table(cells(table)))]
    with replacing(output / "measure.html") as file:
        file.write(html.document("KL-flow beside an autoregressive model", [*parts, *map(html.note, NOTES)]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/kl_flow"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(ROOT/measure)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(Plan.steps), help="of the denoiser (8 32 128)")
    for name in ("texts", "gaps", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan, name), help="(%(default)s)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plan = Plan(steps=tuple(args.steps), texts=args.texts, gaps=args.gaps, batch_size=args.batch_size)
    output = args.output or args.root / "measure"
    try:
        by_text, by_gap = measure(args.root, output, plan)
    except (ValueError, OSError) as error:
        print(f"measure: error: {error}", file=sys.stderr)
        return 2
    publish(output, plan, {"Texts from nothing": by_text, "Gaps in held-out functions": by_gap})
    print((output / "measure.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
