"""Find SED-SFT's threshold for a given share of exempt tokens, and print it as lines of a recipe.

A token is exempt, and trained by plain cross-entropy, if the model's k largest probabilities sum to the threshold or
more. The authors' script counts all tokens of 100 conversations, prompts included, and exempts 0.7 of them. By default
this command counts supervised tokens only, because only they are trained on (--tokens all counts all). Calibrate with
the model that training starts from.
"""

import argparse
from pathlib import Path

from megatron_sfr.cli.model_args import add_device_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="folder of the Hugging Face model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument(
        "--top-k", type=int, default=10, help="number of probabilities to sum: the loss's sed_top_k (%(default)s)"
    )
    parser.add_argument(
        "--exempt", type=float, default=0.7, metavar="SHARE", help="share of the tokens to exempt (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=100, help="number of conversations, from the first (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per batch (%(default)s)")
    parser.add_argument(
        "--tokens",
        choices=["supervised", "all"],
        default="supervised",
        help="tokens to count: those that are trained on, or all, prompts included, as the authors do (%(default)s)",
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.storage.model_folders import check_model_folder

    check_model_folder(args.model)
    data = PreparedData.open(args.data)
    data.check()

    from megatron_sfr.evaluation.generate.transformers_engine import load_model
    from megatron_sfr.evaluation.sed_threshold import CalibrationOptions, threshold, top_masses

    options = CalibrationOptions(
        top_k=args.top_k,
        exempt=args.exempt,
        samples=args.samples,
        batch_size=args.batch_size,
        tokens=args.tokens,
    )
    model = load_model(str(args.model), args.model, device=args.device, dtype=args.dtype)
    p_n = top_masses(model, data, options)
    found = threshold(p_n, options.exempt)
    quartiles = " ".join(f"{q:.4f}" for q in np.quantile(p_n.numpy(), (0.25, 0.5, 0.75)))
    counted = "supervised tokens" if options.tokens == "supervised" else "tokens, prompts included,"
    print(f"# P_{options.top_k} by {args.model} on {args.data}")
    print(f"# {found.n:,} {counted} of {min(options.samples, len(data)):,} conversations; quartiles {quartiles}")
    print(f"# P_{options.top_k} >= {found.tau} exempts {found.exempt:,} of them: {found.share:.4f}")
    if abs(found.share - options.exempt) > 1 / found.n:
        print(f"# no threshold is nearer to {options.exempt}: {found.tied:,} tokens have the same P_{options.top_k}")
    print(f"objective: sed\nsed_top_k: {options.top_k}\nsed_threshold: {found.tau}")
    return 0
