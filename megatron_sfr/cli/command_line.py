"""`megatron-sfr`: the table of commands, the parser, and the exit codes."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from megatron_sfr.storage.user_files import is_out_of_memory, one_line, reason

OUT_OF_MEMORY = (
    "no memory is left; lower the batch size, the number of processes or the length, or use a machine with more memory"
)
COMMANDS = {  # command: its folder in cli/
    "demo": "training",
    "prepare": "data",
    "prepare-text": "data",
    "inspect": "data",
    "embed": "data",
    "calibrate-sed": "training",
    "reference": "training",
    "train": "training",
    "status": "training",
    "plan": "training",
    "convert": "training",
    "generate": "evaluation",
    "flow-generate": "evaluation",
    "evaluate": "evaluation",
    "evaluate-code": "evaluation",
    "watch": "evaluation",
    "diagnose": "evaluation",
    "doctor": "training",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; their modules import nothing heavy."""
    parser = argparse.ArgumentParser(prog="megatron-sfr", description="Train language models that stay diverse.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, folder in COMMANDS.items():
        module = importlib.import_module(f"megatron_sfr.cli.{folder}.{name.replace('-', '_')}")
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: success; 2: a user error, printed in one line; 130: stopped by Ctrl-C; 141: the reader of the output has ended.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_flags_on", False):
        parser.error(f"unknown argument {rest[0]}")
    args.flags = rest
    try:
        code = args.run(args)
        _flush()
        return code
    except BrokenPipeError:  # the reader of the output has ended; Python's flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        return _failed(args.command, f"{OUT_OF_MEMORY} ({reason(error)})" if is_out_of_memory(error) else _said(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(args.command, f"{OUT_OF_MEMORY} ({reason(error)})")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "megatron_sfr":
            raise
        return _failed(
            args.command,
            f"the Python module {error.name} is not installed; `megatron-sfr doctor` lists all that are missing",
        )
    except KeyboardInterrupt:
        return 130


def _said(error: ValueError | OSError) -> str:
    """The message of an error; of the system's own about a file as other programs print it, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _flush() -> None:
    """Writes what is left of standard output. Raises OSError if that fails, and then drops it: Python flushes again."""
    if sys.stdout is None:  # it was closed before the command started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, f"standard output: {error.strerror}") from error


def _failed(command: str, why: str) -> int:
    print(f"megatron-sfr {command}: error: {one_line(why)}", file=sys.stderr)
    return 2
