"""The commands of `megatron-sfr`, one file each: add_arguments(parser) and run(args) -> exit code."""
