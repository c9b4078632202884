"""Turn JSONL conversations into memory-mapped tokens, loss masks and anchors.

A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or a record of
ShareGPT or alpaca; the first record of a file determines its format. The record's "persona" becomes the system turn of
a conversation that has none. The loss is on the assistant's turns, each with its end token, after exactly the tokens
that the model is given at inference. The output folder appears when it is complete; the same command resumes a run that
was killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sfr.cli.template_args import add_template_arguments, template_options

if TYPE_CHECKING:
    from megatron_sfr.data.prepared.conversations import PreparedManifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="files of records (JSONL or JSON array, also .gz or .zst; Parquet; Arrow), folders of them, or datasets",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the model's tokenizer, with a chat template")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--format",
        metavar="messages|sharegpt|alpaca|completion",
        help="format of all records (default: recognized by the first record of each file)",
    )
    parser.add_argument(
        "--persona-key", default="persona", metavar="NAME", help="field that marks the style (default: %(default)s)"
    )
    parser.add_argument(
        "--turns",
        default="together",
        metavar="together|each|last|as-rendered",
        help="samples of a conversation: one with all replies, each after the tokens of inference, or the record is "
        "refused; one for each reply; one with the last reply; one as the template writes it (default: %(default)s)",
    )
    parser.add_argument(
        "--train-on", default="all", metavar="all|last", help="replies with a loss (default: %(default)s)"
    )
    add_template_arguments(parser)
    parser.add_argument("--seq-length", type=int, default=2048, help="longest sample, in tokens (default: %(default)s)")
    parser.add_argument(
        "--too-long",
        default="error",
        metavar="error|truncate",
        help="a longer one is a bad record, or is cut (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        choices=("reference",),
        help="place anchors and windows as SFR's public code does, for --sfr-preset reference (docs/differences.md)",
    )
    add_cut_arguments(parser)


def add_cut_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments about anchors, their futures and the run, shared with `prepare-text`."""
    parser.add_argument("--split", metavar="NAME", help="split of an input that is a dataset (default: its only one)")
    parser.add_argument("--subset", metavar="NAME", help="configuration of a dataset on the hub (default: its own)")
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument("--stride", type=int, default=32, help="tokens between anchors (default: %(default)s)")
    parser.add_argument(
        "--segments",
        choices=("window", "sentence", "statement"),
        default="window",
        help="what horizons count: tokens (window), sentences, or statements of source code; 1 is the next to start "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--horizons",
        nargs="+",
        metavar="OFFSET:LENGTH",
        help="futures of an anchor, in the unit of --segments; an anchor has a target for each (default: 1:256 for "
        "window, 1:1 otherwise); `reply`: the whole reply, equal at each anchor",
    )
    parser.add_argument(
        "--min-segment-length",
        type=int,
        default=16,
        help="leave out targets that the end of the text cuts to fewer tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="write bad records to OUTPUT/rejected.jsonl and continue (default: stop at the first)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each processor, at most 8)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace existing prepared data of other inputs or options"
    )


def cut_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `add_cut_arguments` sets, by the names that they have in PrepareOptions and DocumentOptions."""
    from megatron_sfr.data.segments.segmenters import DEFAULTS, parse_horizons
    from megatron_sfr.storage.input_files import DatasetOptions

    return {
        "stride": args.stride,
        "horizons": parse_horizons(args.horizons) if args.horizons else (DEFAULTS[args.segments],),
        "min_segment_length": args.min_segment_length,
        "segmenter": args.segments,
        "skip_bad_rows": args.skip_bad_rows,
        "dataset": DatasetOptions(split=args.split, subset=args.subset, revision=args.revision),
    }


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.chat.template_options import SampleOptions
    from megatron_sfr.data.prepare.chat_source import PrepareOptions
    from megatron_sfr.data.prepare.pipeline import prepare
    from megatron_sfr.data.prepare.worker_pool import default_workers

    options = PrepareOptions(
        seq_length=args.seq_length,
        format=args.format,
        persona_key=args.persona_key,
        too_long=args.too_long,
        chat=SampleOptions(turns=args.turns, train_on=args.train_on, **template_options(args)),
        anchor_rule=args.preset or "replies",
        **cut_options(args),
    )
    workers = default_workers() if args.workers is None else args.workers
    _report(prepare(args.input, args.output, args.tokenizer, options, force=args.force, workers=workers), args.output)
    return 0


def _report(result: PreparedManifest, output: Path) -> None:
    """Prints what a folder holds and what comes next."""
    from megatron_sfr.training.data.epochs import sequences_of

    horizons = f" at {len(result.horizons)} horizons" if len(result.horizons) > 1 else ""
    print(
        f"{output}: {_samples(result.samples, result.conversations)}, {result.tokens:,} tokens "
        f"({result.supervised_tokens:,} supervised), {result.anchors:,} anchors{horizons}, "
        f"{result.segments:,} distinct segments, {len(result.personas.keys() - {''})} personas"
    )
    if result.truncated:
        print(f"{result.truncated:,} samples truncated to {result.seq_length} + 1 tokens")
    if result.unlike_last:
        print(
            f"{result.unlike_last:,} earlier replies are trained without the empty thought that the chat template "
            "writes in the last one; --turns each writes it in each"
        )
    if result.unlike_inference:
        print(
            f"{result.unlike_inference:,} replies are not complete, or follow another context than at inference, as "
            "--turns as-rendered allows; --turns each trains them as inference shows them"
        )
    if result.duplicates:
        print(f"{result.duplicates:,} samples have the tokens of an earlier one; they are kept")
    if result.rejected:
        print(f"{result.rejected:,} bad records are in {output / 'rejected.jsonl'}, with their reasons")
    packed = sequences_of(output, result.seq_length, packed=True)
    epoch = f"{result.samples:,} sequences, or {packed:,} packed ones with --sfr-packing"
    print(f"an epoch is {epoch}; train_epochs counts in them")
    if result.segments:
        print(f"next: megatron-sfr embed --data {output} --encoder minilm   (or another encoder)")
    else:
        print("no reply is long enough for an anchor: SFR has nothing to learn here (see --min-segment-length)")


def _samples(samples: int, conversations: int | None) -> str:
    if conversations in (None, samples):
        return f"{samples:,} conversations"
    return f"{samples:,} samples of {conversations:,} conversations"
