"""Arguments that choose what samples replies (transformers, vLLM or a server), and the engine built from them."""

import argparse
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from megatron_sfr.cli.model_args import MODEL, model_folders, named

if TYPE_CHECKING:
    from megatron_sfr.evaluation.generate.engines import Engine

KEY = "OPENAI_API_KEY"
SERVER = (
    *("server_model", "server_api", "server_args"),
    *("server_key_env", "server_concurrency", "server_timeout", "server_retries"),
)
VLLM = ("tensor_parallel_size", "vllm_args")
ENGINE = ("engine", *VLLM, *SERVER)
LOCAL = ("engine", *VLLM, "dtype", "template_kwargs", "template_date", "special_text", "reply_end")
"""What a server decides."""


def add_model_arguments(group: Any) -> None:
    """Adds --model and --server to a group of which one is required."""
    group.add_argument("--model", **MODEL)
    group.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server instead, such as http://localhost:8000/v1"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the engines, which `generate` and `evaluate` share."""
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="(%(default)s)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share a model in vLLM (%(default)s)"
    )
    parser.add_argument(
        "--vllm-args",
        metavar="JSON",
        help='further engine arguments of vLLM, such as \'{"gpu_memory_utilization": 0.8, "max_model_len": 8192}\'',
    )
    server = parser.add_argument_group("with --server")
    server.add_argument(
        "--server-model",
        nargs="+",
        action="extend",
        metavar="[NAME=]MODEL",
        help="models by the server's names (default: the only one; NAME defaults to the server's name)",
    )
    server.add_argument(
        "--server-api",
        choices=["chat", "completions"],
        default="chat",
        help="chat: the server applies the chat template; completions: a base model continues the prompt (%(default)s)",
    )
    server.add_argument(
        "--server-args", metavar="JSON", help="further fields of each request; null leaves out one that is sent"
    )
    server.add_argument(
        "--server-key-env", metavar="VARIABLE", help=f"environment variable that holds the key (default: {KEY}, if set)"
    )
    server.add_argument(
        "--server-concurrency", type=int, default=16, metavar="N", help="requests at a time (%(default)s)"
    )
    server.add_argument(
        "--server-timeout", type=float, default=600.0, metavar="SECONDS", help="wait for an answer (%(default)s)"
    )
    server.add_argument(
        "--server-retries",
        type=int,
        default=6,
        metavar="N",
        help="repetitions after 429, 5xx, a lost connection or a damaged answer, with growing pauses (%(default)s)",
    )


def engine_of(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], *, encodes: bool = False
) -> "Engine":
    """The engine that the arguments of a command choose. Raises ValueError for those that would have no effect.

    encodes: whether --device is for a sentence encoder too.
    """
    from megatron_sfr.evaluation.generate.engines import HuggingFace

    if args.server is not None:
        decided = LOCAL if encodes else (*LOCAL, "device")
        refuse_given(args, add_arguments, decided, "has no effect with --server, which decides this")
        return _server(args)
    refuse_given(args, add_arguments, SERVER, "goes with --server")
    if args.engine != "vllm":
        refuse_given(args, add_arguments, VLLM, "goes with --engine vllm")
    device = None if encodes and args.engine == "vllm" else args.device
    return HuggingFace(model_folders(args.model), args.engine, device, args.dtype, _vllm_arguments(args))


def refuse_given(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], names: Iterable[str], why: str
) -> None:
    """Raises ValueError for the first of these arguments that differs from its default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out")


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """The JSON object of a flag; empty for None."""
    from megatron_sfr.storage.user_files import parse_json, shown

    if text is None:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{flag} {shown(text)}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag} {shown(text)}: write a JSON object, such as '{{\"name\": 1}}'")
    return value


def server_key(flag: str, variable: str | None) -> str | None:
    """The key of a server, from the environment variable that a flag names, or from the usual one if that is set."""
    key = os.environ.get(variable or KEY)
    if variable and not key:
        raise ValueError(f"{flag} {variable}: this environment variable is not set")
    return key


def _vllm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    found = json_object("--vllm-args", args.vllm_args)
    if "tensor_parallel_size" in found:
        raise ValueError("--vllm-args: give tensor_parallel_size by --tensor-parallel-size")
    if args.tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size {args.tensor_parallel_size}: give at least 1")
    size = {"tensor_parallel_size": args.tensor_parallel_size} if args.tensor_parallel_size > 1 else {}
    return found | size


def _server(args: argparse.Namespace) -> "Engine":
    from megatron_sfr.evaluation.generate.server_engine import Server, only_model
    from megatron_sfr.evaluation.generate.server_requests import Connection

    key = server_key("--server-key-env", args.server_key_env)
    connection = Connection(args.server, key, args.server_timeout, args.server_retries)
    names = named("--server-model", args.server_model or [only_model(connection)])
    fields = json_object("--server-args", args.server_args)
    return Server(connection, names, args.server_api, fields, args.server_concurrency)
