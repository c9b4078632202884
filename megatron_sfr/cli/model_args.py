"""Arguments shared by the commands that sample from models, and the options built from them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sfr.cli.template_args import add_template_arguments, template_options

MODEL: dict[str, Any] = {
    "nargs": "+",
    "action": "extend",  # a second --model adds to the first
    "metavar": "NAME=DIR",
    "help": "Hugging Face folders (NAME defaults to the folder's name)",
}
SAMPLING = ("samples", "top_k", "top_p", "max_new_tokens", "seed", "batch_size", "dtype")
TEMPLATE = ("persona_as", "template_kwargs", "template_date", "special_text", "reply_end")


def add_sampling_arguments(parser: argparse.ArgumentParser, device: str | None = None) -> None:
    """Adds the arguments of sampling, which `generate`, `evaluate` and `watch` share. device: --device's default."""
    parser.add_argument("--samples", type=int, default=8, help="replies per prompt (%(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens with total probability p (%(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest reply, in tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="replies sampled together (%(default)s)")
    add_device_arguments(parser, device)
    add_template_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser, device: str | None = None) -> None:
    """Adds the arguments of every command that runs a model: where, and in which dtype. device: --device's default."""
    usual = device or "a GPU if there is one, else cpu"
    parser.add_argument("--device", default=device, help=f"torch device (default: {usual})")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the model's)")


def model_folders(given: list[str]) -> dict[str, Path]:
    """{NAME: DIR} from `NAME=DIR` or `DIR` arguments. Raises ValueError for a repeated name."""
    folders = named("--model", given, lambda folder: os.path.basename(os.path.realpath(folder)))
    return {name: Path(folder) for name, folder in folders.items()}


def split_name(text: str) -> tuple[str | None, str]:
    """Name and value of `NAME=VALUE`. The name is None in `VALUE`, and where the text is a path that exists."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and not Path(text).exists() else (None, text)


def named(flag: str, given: list[str], default: Callable[[str], str] = str) -> dict[str, str]:
    """{NAME: VALUE} from `NAME=VALUE` or `VALUE` arguments, whose name is default(VALUE)."""
    found: dict[str, str] = {}
    for text in given:
        name, value = split_name(text)
        name = default(value) if name is None else name
        if not name or name in found:
            raise ValueError(f"{flag} {text}: the name {name!r} is taken or empty; write NAME=VALUE, each name once")
        found[name] = value
    return found


def sampling_options(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # its type is a heavy import
    from megatron_sfr.data.chat.template_options import TemplateOptions
    from megatron_sfr.evaluation.generate.sampling import SamplingOptions

    return SamplingOptions(
        samples=args.samples,
        temperature=getattr(args, "temperature", 1.0),
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batch_size=args.batch_size,
        template=TemplateOptions(**template_options(args)),
    )
