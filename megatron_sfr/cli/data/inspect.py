"""Show the contents of a prepared folder: its counts, and a sample with the text that the model learns to write.

Supervised text is green, the rest dim; without colour supervised text is in [[...]]. Below are the sample's anchors and
the future text that each is to predict. Of documents it shows the counts and the futures of one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.data.prepared.documents import PreparedDocuments

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # data must not command a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare or prepare-text"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="number of the sample, from 0 (default: a random one)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of random samples (default: different ones each time)"
    )
    parser.add_argument("--anchors", type=int, default=8, metavar="N", help="anchors to show (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--counts", action="store_true", help="show only the counts")
    what.add_argument("--html", type=Path, metavar="FILE", help="write a page with a few samples instead")
    what.add_argument(
        "--verify",
        action="store_true",
        help="compare the checksums of the folder and of the stores in it, reading every byte; shows nothing",
    )
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer, if it was moved")


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.prepared.documents import PreparedDocuments
    from megatron_sfr.data.prepared.inspect import counts, tokenizer_of
    from megatron_sfr.data.prepared.inspect_html import SAMPLES, write_page
    from megatron_sfr.data.prepared.open import open_prepared

    data = open_prepared(args.data)
    if args.verify:
        return _verify(data)
    if isinstance(data, PreparedDocuments):
        return _run_on_documents(data, args)
    chosen = _choose(len(data), args.sample, args.seed, SAMPLES if args.html else 1)
    _print_counts(data.folder, counts(data))
    if args.counts:
        return 0
    tokenizer = tokenizer_of(data, args.tokenizer)
    if args.html:
        write_page(args.html, data, chosen, tokenizer)
        print(f"samples {', '.join(map(str, chosen))}: {args.html}")
    else:
        _show(data, chosen[0], tokenizer, args.anchors, colour=_colour(args.color))
    return 0


def _verify(data: PreparedData | PreparedDocuments) -> int:
    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.data.prepared.reference_store import ReferenceStore, is_reference_store
    from megatron_sfr.data.targets.store import TargetStore, is_store

    data.check()
    data.verify()
    print(f"{data.folder}: every file is as it was written")
    for folder in sorted(path for path in data.folder.iterdir() if is_store(path)):
        store = TargetStore.open(folder, data, partial=True)
        store.verify()
        state = "" if store.manifest.complete else "; not complete"
        print(f"{folder}: every target is as it was written{state}")
    if isinstance(data, PreparedData):
        for folder in sorted(path for path in data.folder.iterdir() if is_reference_store(path)):
            ReferenceStore.open(folder, data).verify()
            print(f"{folder}: every probability is as it was written")
    return 0


def _run_on_documents(data: PreparedDocuments, args: argparse.Namespace) -> int:
    from megatron_sfr.data.prepared.inspect import document_counts, futures_of_document

    if args.html:
        raise ValueError("--html shows conversations; leave it out for documents")
    (number,) = _choose(len(data), args.sample, args.seed, 1)
    _print_counts(data.folder, document_counts(data))
    if not args.counts:
        futures = list(futures_of_document(data, number))
        print(f"\ndocument {number}: {len(futures)} anchors")
        for position, horizon, text in futures[: args.anchors]:
            print(f"  after token {position}, horizon {horizon}")
            print(textwrap.indent(_safe(text), "    "))
        _print_rest(len(futures), args.anchors)
    return 0


def _print_counts(folder: Path, counts: list[tuple[str, str]]) -> None:
    print(folder)
    for name, text in counts:
        print(f"  {name:<14}{_safe(text)}")


def _print_rest(found: int, most: int) -> None:
    if found > most:
        print(f"  {found - most} more (--anchors {found})")


def _choose(total: int, sample: int | None, seed: int | None, count: int) -> list[int]:
    import numpy as np

    if sample is None:
        return np.random.default_rng(seed).choice(total, min(count, total), replace=False).tolist()
    if not 0 <= sample < total:
        raise ValueError(f"there is no sample {sample}; give one from 0 to {total - 1}")
    return [sample]


def _show(data: PreparedData, number: int, tokenizer: Any, most: int, *, colour: bool) -> None:
    from megatron_sfr.data.prepared.inspect import futures_of, pieces

    sample = data[number]
    supervised = int(sample.loss_mask.sum())
    persona = f", persona {sample.persona}" if sample.persona else ""
    print(f"\nsample {number}{_safe(persona)}: {len(sample.tokens):,} tokens, {supervised:,} supervised\n")
    for piece in pieces(sample, tokenizer):
        text = _safe(piece.text)
        if colour:
            print(f"{GREEN if piece.supervised else DIM}{text}{RESET}", end="")
        else:
            print(f"[[{text}]]" if piece.supervised else text, end="")
    futures = list(futures_of(data, sample))
    print(f"\n\n{len(futures)} anchors")
    for future in futures[:most]:
        where = f"before token {future.ordinal} of {future.length} of reply {future.response + 1}"
        print(f"  position {future.position}, {where}, horizon {future.horizon}")
        print(textwrap.indent(_safe(future.text), "    "))
    _print_rest(len(futures), most)


def _colour(choice: str) -> bool:
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always" or (choice == "auto" and wanted)


def _safe(text: str) -> str:
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
