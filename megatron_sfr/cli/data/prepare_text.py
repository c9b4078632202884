"""Turn a pretraining corpus into documents with anchors and futures, for continued pretraining with SFR.

Records {"text": "..."} become Megatron's .bin and .idx. An existing .bin and .idx, given by their prefix, stay in
place. The output folder appears when it is complete; the same command resumes a run that was killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sfr.cli.data.prepare import add_cut_arguments, cut_options

EXAMPLE_LENGTH = 4096
"""The seq_length at which an epoch is printed: training chooses its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="files of records (JSONL or JSON array, also .gz or .zst; Parquet; Arrow), folders of them, datasets; or "
        "the prefix of a .bin and .idx",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the model's tokenizer, or that of the .bin")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="field with the text (default: %(default)s)")
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help="token that ends a document (default: the tokenizer's eos_token)"
    )
    add_cut_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.prepare.document_source import DocumentOptions
    from megatron_sfr.data.prepare.pipeline import prepare
    from megatron_sfr.data.prepare.worker_pool import default_workers
    from megatron_sfr.training.data.epochs import sequences_of

    options = DocumentOptions(text_key=args.text_key, eod_token=args.eod_token, **cut_options(args))
    workers = default_workers() if args.workers is None else args.workers
    result = prepare(args.input, args.output, args.tokenizer, options, force=args.force, workers=workers)
    print(
        f"{args.output}: {result.documents:,} documents, {result.tokens:,} tokens, {result.anchors:,} anchors, "
        f"{result.segments:,} distinct segments"
    )
    if result.rejected:
        print(f"{result.rejected:,} bad records are in {args.output / 'rejected.jsonl'}, with their reasons")
    sequences = sequences_of(args.output, EXAMPLE_LENGTH)
    print(f"an epoch is {sequences:,} sequences at seq_length {EXAMPLE_LENGTH:,}; train_epochs counts in them")
    if result.segments:
        print(f"next: megatron-sfr embed --data {args.output} --encoder minilm   (or another encoder)")
    return 0
