"""The arguments of a judge, which rates replies, and the judge built from them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sfr.cli.engine_args import KEY, json_object, refuse_given, server_key

if TYPE_CHECKING:
    from megatron_sfr.evaluation.generate.engines import Engine
    from megatron_sfr.evaluation.judge.judge_replies import Judge

SERVED = ("judge_model", "judge_args", "judge_key_env")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    judge = parser.add_argument_group("judge", "a language model rates context relevance and style; off by default")
    judge.add_argument("--judge", metavar="URL|DIR", help="an OpenAI-compatible server, or a Hugging Face folder")
    judge.add_argument("--judge-votes", type=int, default=3, metavar="N", help="votes per rating (%(default)s)")
    judge.add_argument("--judge-model", metavar="NAME", help="model by the server's name (default: the only one)")
    judge.add_argument(
        "--judge-args", metavar="JSON", help="further fields of each request; null leaves out one that is sent"
    )
    judge.add_argument(
        "--judge-key-env", metavar="VARIABLE", help=f"environment variable that holds the key (default: {KEY}, if set)"
    )


def judge_of(args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]) -> "Judge | None":
    """The judge that the arguments of a command choose. Raises ValueError for those that would have no effect."""
    if args.judge is None:
        refuse_given(args, add_arguments, ("judge_votes", *SERVED), "goes with --judge")
        return None
    from megatron_sfr.evaluation.generate.engines import HuggingFace
    from megatron_sfr.evaluation.judge.judge_replies import Judge

    if "://" in args.judge:
        return Judge(_server(args), args.judge_votes)
    refuse_given(args, add_arguments, SERVED, f"is for a server, and --judge {args.judge} is a folder")
    judge = Judge(
        HuggingFace({Path(args.judge).resolve().name: Path(args.judge)}, device=args.device), args.judge_votes
    )
    judge.engine.check()
    return judge


def _server(args: argparse.Namespace) -> "Engine":
    from megatron_sfr.evaluation.generate.server_engine import Server, only_model
    from megatron_sfr.evaluation.generate.server_requests import Connection
    from megatron_sfr.evaluation.judge.judge_replies import in_terms_of_judge

    key = server_key("--judge-key-env", args.judge_key_env)
    with in_terms_of_judge():
        connection = Connection(args.judge, key)
        model = args.judge_model or only_model(connection)
        return Server(connection, {model: model}, fields=json_object("--judge-args", args.judge_args))
