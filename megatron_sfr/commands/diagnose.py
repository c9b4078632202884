"""Find where a model is locked and where it forks, and compare models there.

Reads samples of a prepared folder: entropy, top-1 mass and tail mass at each position of a reply. The first model is
the base, which decides what a lock and a fork is. Writes lock_fork.html and lock_fork.json.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=DIR",
        help="Hugging Face folders, base first",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder that `prepare` wrote")
    parser.add_argument("--samples", type=int, default=48, help="conversations that are read (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="the tail is what lies outside (%(default)s)")
    parser.add_argument("--lock-entropy", type=float, default=0.25, metavar="Q", help="quantile (%(default)s)")
    parser.add_argument("--lock-top", type=float, default=0.9, metavar="P", help="probability (%(default)s)")
    parser.add_argument("--fork-entropy", type=float, default=0.75, metavar="Q", help="quantile (%(default)s)")
    parser.add_argument("--device", help="torch's name of a device (default: a GPU if there is one, else cpu)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the model's own)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from megatron_sfr.commands.generate import model_folders
    from megatron_sfr.data.prepared import PreparedData
    from megatron_sfr.data.template import load_tokenizer
    from megatron_sfr.diagnostics.examine import ExamineOptions, examine
    from megatron_sfr.diagnostics.futures import FutureOptions
    from megatron_sfr.diagnostics.labels import LabelOptions
    from megatron_sfr.diagnostics.page import page
    from megatron_sfr.diagnostics.summary import as_json, table
    from megatron_sfr.evaluation.bootstrap import estimate
    from megatron_sfr.evaluation.calibration import CalibrationOptions, check_same_tokens
    from megatron_sfr.evaluation.sampling import check_folder, load_model
    from megatron_sfr.evaluation.tables import whole

    labels = LabelOptions(lock_entropy=args.lock_entropy, lock_top=args.lock_top, fork_entropy=args.fork_entropy)
    options = ExamineOptions(labels, FutureOptions(), args.samples, args.top_p)
    data = PreparedData.open(args.data)
    folders = model_folders(args.model)
    for folder in folders.values():
        check_folder(folder)

    def load(name: str, folder: Path):  # type: ignore[no-untyped-def]  # a Hugging Face network
        model = load_model(name, folder, device=args.device, dtype=args.dtype)
        check_same_tokens(model, data, CalibrationOptions(top_k=1))
        return model.network

    diagnosis = examine({name: partial(load, name, folder) for name, folder in folders.items()}, data, options)
    rows = table(diagnosis, estimate)
    notes = [f"{len(diagnosis.where.token):,} positions of {min(args.samples, len(data))} samples of {args.data.name}."]
    tokenizer = load_tokenizer(str(folders[diagnosis.base]))
    for name, text in {
        "lock_fork.html": page(diagnosis, rows, notes, tokenizer, data),
        "lock_fork.json": as_json(diagnosis, rows),
    }.items():
        with whole(args.output / name) as file:
            file.write(text)
    print(f"{diagnosis.base}: {diagnosis.labelled.rule}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (12, 5, 14, 36, 9), strict=True)))
    print(f"{args.output / 'lock_fork.html'}")
    return 0
