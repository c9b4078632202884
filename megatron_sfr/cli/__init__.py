"""The commands of `megatron-sfr`, one file each: add_arguments(parser) and run(args) -> exit code."""

from megatron_sfr.cli.command_line import COMMANDS, build_parser, main

__all__ = ["COMMANDS", "build_parser", "main"]
