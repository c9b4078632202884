"""The arguments of a run on a cluster, parsed on any machine as the first rank of the cluster would parse them.

Nothing is built and no data are read, except for the steps of `train_epochs`.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sfr.config.recipe import naming
from megatron_sfr.config.settings import Settings, check, flag_parser, merge, parse
from megatron_sfr.runtime import cpu
from megatron_sfr.runtime.devices import gpus
from megatron_sfr.training.data.epochs import train_iters_of


def merged_flags(recipes: Sequence[Path], flags: Sequence[str]) -> tuple[argparse.Namespace, list[str], int | None]:
    """The options of recipes and flags before Megatron checks them, their flags, and the steps of the run.

    The steps are None where they are given as epochs of data that are not on this machine.
    """
    _, merged = merge(recipes, flags)
    args = flag_parser().read(merged)
    with naming(recipes):
        check(args)
    steps = args.train_iters
    if args.train_epochs is not None:
        try:
            steps = train_iters_of(vars(args))
        except (ValueError, OSError):
            steps = None
        merged += ["--train-iters", str(steps or 1)]
    elif steps is None and args.train_samples and (batch := args.global_batch_size or args.micro_batch_size):
        steps = args.train_samples // batch
    return args, merged, steps


def cluster_args(merged: Sequence[str], processes: int) -> argparse.Namespace:
    """Megatron's arguments, checked by Megatron for this many processes.

    On a machine without GPUs the CPU seam answers Megatron's questions about the GPU as Hopper. Rope fusion is left
    out, because Megatron refuses it where Transformer Engine is absent; it changes no size.

    Raises:
        ValueError: Megatron refuses the flags.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(processes)}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not gpus():
        cpu.install()
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all arguments
        return parse(Settings([*merged, "--no-rope-fusion"], {}, "cuda", []))
