"""Find positions where a model is certain (lock) and where several futures are open (fork), and compare models there.

Computes entropy, top-1 probability and tail mass at each position of the replies of a prepared folder. The first model
is the base, which determines locks and forks. With its flow head (`convert export --keep-head`), futures are drawn at
each position. Writes lock_fork.html and lock_fork.json.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sfr.cli.engine_args import refuse_given
from megatron_sfr.cli.model_args import add_device_arguments, model_folders

if TYPE_CHECKING:
    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.data.targets.store import TargetStore
    from megatron_sfr.evaluation.lock_fork.examine import Head
    from megatron_sfr.evaluation.lock_fork.summary import Diagnosis

FUTURES = ("targets", "draws", "steps", "method", "horizon", "fork_dispersion")
"""Arguments about the futures that are drawn from a flow head."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=DIR",
        help="Hugging Face folders, base first",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument("--samples", type=int, default=48, help="number of conversations to read (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="the tail is the probability outside the top p (%(default)s)"
    )
    parser.add_argument("--lock-entropy", type=float, default=0.25, metavar="Q", help="quantile (%(default)s)")
    parser.add_argument("--lock-top", type=float, default=0.9, metavar="P", help="probability (%(default)s)")
    parser.add_argument("--fork-entropy", type=float, default=0.75, metavar="Q", help="quantile (%(default)s)")
    parser.add_argument("--fork-dispersion", type=float, default=0.75, metavar="Q", help="quantile (%(default)s)")
    parser.add_argument(
        "--head", type=Path, metavar="DIR", help="folder of the base's flow head (default: the base's, if it has one)"
    )
    parser.add_argument("--targets", type=Path, metavar="DIR", help="the target store (default: DATA/targets)")
    parser.add_argument("--draws", type=int, default=16, help="futures drawn per position (%(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="steps of the solver (%(default)s)")
    parser.add_argument("--method", choices=("euler", "heun"), default="heun", help="the solver (%(default)s)")
    parser.add_argument("--horizon", type=int, default=0, help="index of the head's horizon, from 0 (%(default)s)")
    add_device_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.storage.model_folders import check_model_folder

    data = PreparedData.open(args.data)
    data.check()
    folders = model_folders(args.model)
    for folder in folders.values():
        check_model_folder(folder)

    from megatron_sfr.evaluation.conversation_logits import check_same_tokens
    from megatron_sfr.evaluation.generate.transformers_engine import load_model
    from megatron_sfr.evaluation.lock_fork.examine import ExamineOptions, examine
    from megatron_sfr.evaluation.lock_fork.futures import FutureOptions
    from megatron_sfr.evaluation.lock_fork.labels import LabelOptions
    from megatron_sfr.storage.lock import hold

    labels = LabelOptions(args.lock_entropy, args.lock_top, args.fork_entropy, args.fork_dispersion)
    futures = FutureOptions(args.draws, args.steps, args.method, horizon=args.horizon)
    options = ExamineOptions(labels, futures, args.samples, args.top_p)
    head, store = _head(args, next(iter(folders.values())), data)

    def load(name: str, folder: Path):  # type: ignore[no-untyped-def]  # a Hugging Face network
        model = load_model(name, folder, device=args.device, dtype=args.dtype)
        check_same_tokens(model, data, top_k=1)
        return model.network

    models = {name: partial(load, name, folder) for name, folder in folders.items()}
    with hold(args.output, inside=True):
        _write(args, folders, data, store, examine(models, data, options, head))
    return 0


def _head(args: argparse.Namespace, base: Path, data: "PreparedData") -> "tuple[Head | None, TargetStore | None]":
    """The flow head and its target store; (None, None) if none was requested and the base has none.

    Raises ValueError for arguments that have no effect without a head.
    """
    import torch

    from megatron_sfr.data.targets.store import DEFAULT, TargetStore
    from megatron_sfr.evaluation.lock_fork.examine import Head
    from megatron_sfr.evaluation.lock_fork.futures import Scale
    from megatron_sfr.hf.head_files import DESCRIPTION, load_head, read_description, stored_options
    from megatron_sfr.objectives.sfr.target_scale import TargetOptions

    folder = args.head or base
    if args.head is None and not (base / DESCRIPTION).is_file():
        refuse_given(args, add_arguments, FUTURES, f"goes with a flow head, which {base} does not have")
        return None, None
    head = load_head(folder)
    said = read_description(folder)
    store = TargetStore.open(args.targets or args.data / DEFAULT, data)
    known = said.get("encoder") or {}
    encoder = store.manifest.encoder_sha256
    if head.dim != store.dim or known.get("encoder_sha256", encoder) != encoder:
        raise ValueError(f"{store.folder} has embeddings of another encoder than the head in {folder} was trained on")
    if said["loss"] != "flow" or not args.horizon < said["horizons"]:
        raise ValueError(
            f"the head in {folder} was trained with sfr_loss = {said['loss']} and {said['horizons']} horizons: futures "
            "are drawn from flow alone, and --horizon counts from 0"
        )
    options = stored_options(TargetOptions, said["targets"])
    mean, std = (torch.from_numpy(values.copy()) for values in (store.mean, store.std))
    if options.scale == "whiten":  # what the head was trained with, wherever it came from
        mean, std = head.state.target_mean, head.state.target_std
    layer = said["head"].get("sfr_layer")
    return Head(head.float(), Scale(mean, std, options), -1 if layer is None else layer), store


def _write(
    args: argparse.Namespace,
    folders: dict[str, Path],
    data: "PreparedData",
    store: "TargetStore | None",
    diagnosis: "Diagnosis",
) -> None:
    """Writes the page and the numbers, and prints the table."""
    from megatron_sfr.data.chat.tokenizer import load_tokenizer
    from megatron_sfr.evaluation.lock_fork.lock_fork_html import page
    from megatron_sfr.evaluation.lock_fork.summary import as_json, table
    from megatron_sfr.evaluation.scores.bootstrap import estimate
    from megatron_sfr.storage.atomic import replacing

    rows = table(diagnosis, estimate)
    notes = [f"{len(diagnosis.where.token):,} positions of {min(args.samples, len(data))} samples of {args.data.name}."]
    if store is not None:
        how = f"{args.draws} futures per position by {args.method} in {args.steps} steps, horizon {args.horizon}"
        notes.append(f"{how}; their targets are those of {store.manifest.encoder}.")
    tokenizer = load_tokenizer(str(folders[diagnosis.base]))
    for name, text in {
        "lock_fork.html": page(diagnosis, rows, notes, tokenizer, data, store),
        "lock_fork.json": as_json(diagnosis, rows),
    }.items():
        with replacing(args.output / name) as file:
            file.write(text)
    print(f"{diagnosis.base}: {diagnosis.labelled.rule}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (12, 5, 14, 36, 9), strict=True)))
    print(f"{args.output / 'lock_fork.html'}")
