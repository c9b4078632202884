"""Compare models over a sweep of temperatures: diversity against quality.

Every model answers the prompts of a file of conversations, whose replies are the references. Writes evaluation.json,
report.md, samples.jsonl and frontier.png. The first model is the baseline of the others.
"""

import argparse
from pathlib import Path

from megatron_sfr.commands.generate import add_model_arguments, model_folders, sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="JSONL conversations held out of training"
    )
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=[0.5, 0.7, 1.0, 1.3], metavar="T", help="(0.5 0.7 1.0 1.3)"
    )
    parser.add_argument("--limit", type=int, default=64, help="at most this many different prompts (%(default)s)")
    parser.add_argument("--encoder", default="minilm", metavar="NAME_OR_DIR", help="sentence encoder (%(default)s)")
    parser.add_argument("--pairs", type=int, default=16, help="BLEU comparisons a prompt and persona (%(default)s)")
    parser.add_argument("--embedded", type=int, default=4, help="replies embedded a prompt and persona (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="models side by side, for CPUs (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.encoder import Encoder, EncoderOptions
    from megatron_sfr.evaluation.answers import Hardware
    from megatron_sfr.evaluation.curves import EvaluationOptions, Scorer
    from megatron_sfr.evaluation.prompts import limit, read_asked
    from megatron_sfr.evaluation.report import Axes
    from megatron_sfr.evaluation.run import evaluate

    if args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least one prompt is needed")
    asked = limit(read_asked(args.data), args.limit)
    if not asked:
        raise ValueError(f"{args.data} has no conversations")
    options = EvaluationOptions(
        sampling=sampling_options(args),
        temperatures=tuple(sorted(args.temperatures)),
        pairs=args.pairs,
        embedded=args.embedded,
    )
    encoder = Encoder(args.encoder, EncoderOptions(device=args.device))
    scorer = Scorer(asked, {"held-out replies": asked}, options, encoder)
    personas = {entry.prompt.persona for entry in asked}
    axes = [Axes("relevance", "self-BLEU-4"), *([Axes("style", "CS-SB-1")] if len(personas) > 1 else [])]
    evaluate(
        model_folders(args.model),
        scorer,
        axes,
        args.output,
        title=f"{args.data.name}: diversity against quality",
        picture="frontier.png",
        hardware=Hardware(args.device, args.dtype, args.processes),
    )
    return 0
