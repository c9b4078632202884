"""megatron-sfr: a table of commands."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = (
    *("demo", "prepare", "prepare-text", "inspect", "embed", "calibrate-sed", "train", "convert"),
    *("generate", "flow-generate", "evaluate", "evaluate-code", "diagnose", "doctor"),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; their modules import nothing heavy."""
    parser = argparse.ArgumentParser(prog="megatron-sfr", description="Train language models that stay diverse.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"megatron_sfr.commands.{name.replace('-', '_')}")
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
    """Runs a command. 0: done; 2: something the user can mend, said in one line; 130: stopped by Ctrl-C."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_flags_on", False):
        parser.error(f"unknown argument {rest[0]}")
    args.flags = rest
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"megatron-sfr {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
