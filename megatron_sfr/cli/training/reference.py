"""Store what a frozen model predicts at each supervised token, for training with ASFT.

ASFT keeps the trained model near the one that training starts from. This command runs that model over the prepared data
once and stores its most likely tokens with their probabilities: with --top-k 32, 260 bytes for each supervised token.
The same command resumes a run that was stopped.
"""

import argparse
from pathlib import Path

from megatron_sfr.cli.model_args import add_device_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="HF_DIR", help="the model that training starts from"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder written by prepare")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the store to write (default: DATA/reference)")
    parser.add_argument(
        "--top-k", type=int, default=32, help="tokens to store separately at each position (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per batch (default: %(default)s)")
    add_device_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace a store that was made with other values")


def run(args: argparse.Namespace) -> int:
    from megatron_sfr.data.prepared.conversations import PreparedData
    from megatron_sfr.data.prepared.reference_store import DEFAULT
    from megatron_sfr.storage.model_folders import check_model_folder

    check_model_folder(args.model)
    data = PreparedData.open(args.data)
    output = args.output if args.output is not None else args.data / DEFAULT
    data.check()

    from megatron_sfr.evaluation.generate.transformers_engine import load_model
    from megatron_sfr.evaluation.reference_probabilities import ReferenceOptions, write_reference

    options = ReferenceOptions(args.top_k, args.batch_size)
    model = load_model(str(args.model), args.model, device=args.device, dtype=args.dtype)
    manifest = write_reference(model, args.model, data, output, options, force=args.force)
    print(
        f"{output}: the {manifest.top_k} most likely of {manifest.vocab_size:,} tokens by {args.model}, at each of "
        f"{manifest.supervised_tokens:,} supervised tokens"
    )
    return 0
