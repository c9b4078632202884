"""The options of a run from our defaults, YAML recipes and flags; later ones take precedence."""

import argparse
import enum
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

from megatron_sfr.config.flags.flag_table import refusal
from megatron_sfr.config.flags.option_parser import OptionParser, to_flags
from megatron_sfr.config.model_class_checks import pattern_flags
from megatron_sfr.config.objective import ObjectiveOptions, check_objective
from megatron_sfr.config.option_flags import add_flags, options
from megatron_sfr.config.recipe import dotted_losses, naming, read_recipes, split_recipes
from megatron_sfr.config.validation import contradiction
from megatron_sfr.hf.load_at_start import StartOptions
from megatron_sfr.hf.megatron.retention import RetentionOptions
from megatron_sfr.kl_flow.corruption import KLFlowOptions
from megatron_sfr.kl_flow.kl_flow_step import TaskOptions
from megatron_sfr.kl_flow.model import KLFlowModelOptions
from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.model.model_class import ModelOptions
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.objectives.token.registry import LOSSES, find_loss
from megatron_sfr.option_names import named, option_names
from megatron_sfr.runtime.backend import BackendOptions, adapt_flags, choose
from megatron_sfr.storage.user_files import one_line
from megatron_sfr.training.data.epochs import train_iters_of
from megatron_sfr.training.data.provider import DataOptions
from megatron_sfr.training.head_optimizer import HeadOptimizerOptions
from megatron_sfr.training.lock_fork import LockForkOptions
from megatron_sfr.training.timing.profile import ProfileOptions, profile_flags
from megatron_sfr.training.tracking.mlflow_log import MLflowOptions


@named("sfr_")
@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint without a flow head is loaded."""

    fresh_head: bool = False
    """Initialize the flow head if the pretrained checkpoint has none (with --finetune or --pretrained-checkpoint). Any
    other parameter that is missing in the checkpoint is an error."""


@named("sfr_")
@dataclass(frozen=True)
class PresetOptions:
    """Settings that belong together."""

    preset: Literal["reference"] | None = None
    """'reference': SFR's loss as in the authors' public code and YAML (arXiv 2605.27971), on data of `megatron-sfr
    prepare --preset reference` and `embed --preset reference`. Recipe and flags override single options. What their
    code does by mistake is only reproduced by the options sfr_fault_*. Default: our own settings, which
    docs/differences.md compares with theirs."""


PARTS = (
    *(TaskOptions, ModelOptions, KLFlowOptions, KLFlowModelOptions, ObjectiveOptions),
    *(DataOptions, PresetOptions, SFROptions, TargetOptions, ScheduleOptions, GateOptions),
    *(FlowHeadOptions, HeadOptimizerOptions, LockForkOptions, LoadOptions, StartOptions, LoRAOptions),
    *(RetentionOptions, ProfileOptions, MLflowOptions, BackendOptions),
)

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "sfr-anchors": "nearest",
        "sfr-target-scale": "l2",
        "sfr-time": "uniform",
        "sfr-time-per": "sequence",
        "sfr-draws": 1,
        "sfr-mean": "microbatch",
        "sfr-weight": 1.0,
        "sfr-weight-on": "loss",
        "sfr-decay": "constant",
        "sfr-head": "mlp",
        "sfr-head-width": 1024,
        "sfr-head-depth": 1,
        "sfr-time-scale": 1.0,
        "sfr-ema": "smooth",
        "sfr-ema-decay": 0.999,
        "sfr-ema-order": "before_step",
        "sfr-gate": "dynamic",
        "sfr-gate-ratio": 1.5,
        "sfr-gate-decay": 0.99,
        "sfr-gate-baseline": "current",
        "sfr-gate-bins": 1,
    }
}

DEFAULTS: dict[str, Any] = {
    "tokenizer-type": "NullTokenizer",  # the data are token ids below --vocab-size
    "calculate-per-token-loss": True,  # every loss is a sum that the global number of tokens divides
    "hidden-dropout": 0.0,  # no current model family uses upstream's 0.1
    "attention-dropout": 0.0,
    "exit-signal-handler": True,  # SIGTERM and Ctrl-C end the run with a complete checkpoint
    "log-interval": 1,
    "eval-interval": 1000,
    "save-interval": 1000,
}


class Parser(OptionParser):
    """Upstream's arguments and ours."""

    def __init__(self) -> None:
        super().__init__()
        add_options(add_megatron_arguments(self))


def flag_parser() -> Parser:
    """The parser of all flags. It is built once: upstream parses its own source for the help texts, which is slow."""
    return _flag_parser(tuple((name, registered.loss) for name, registered in LOSSES.items()))


@functools.cache
def _flag_parser(losses: tuple[tuple[str, type], ...]) -> Parser:
    return Parser()


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds our options to a parser: upstream's extra_args_provider."""
    for part in (*PARTS, *(registered.loss for registered in LOSSES.values())):
        add_flags(part, parser)
    return parser


def resolved(args: argparse.Namespace, parser: Parser) -> dict[str, Any]:
    """A recipe of all arguments that differ from their defaults. Reading it gives the same arguments."""
    defaults, recipe = vars(parser.read([])), {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest not in defaults or value == defaults[action.dest]:
            continue
        if action.nargs == 0 and getattr(action, "const", None) != value:
            continue  # of several switches for one argument, the one that sets this value
        value = value.name if isinstance(value, enum.Enum) else value
        if isinstance(value, tuple):  # upstream's --window-size is one word
            value = ",".join(str(x) for x in value)
        name = action.option_strings[0].removeprefix("--").replace("-", "_")
        recipe[name] = True if action.nargs == 0 else value
    return recipe


@dataclass(frozen=True)
class Settings:
    """The options of a run: flags for upstream's parser, the equivalent recipe, the backend and what it changed."""

    flags: list[str]
    recipe: dict[str, Any]
    backend: Literal["cpu", "cuda"]
    changes: list[str]


def merge(recipes: Sequence[Path], flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Several recipes as one, and all flags of a run: of defaults, a preset, each recipe in turn, the command line.

    Raises:
        ValueError: an option is unknown or has a wrong value. The message names the recipes, unless it is a flag's.
    """
    for path, name in dotted_losses(recipes, flags):  # the parser has their options once they are imported
        with naming([path] if path else []):
            find_loss(name)
    parser = flag_parser()
    recipe = read_recipes(recipes, parser)
    parser.read(flags := parser.spelled(flags))  # a wrong flag is not the recipes' fault
    with naming(recipes):
        args = parser.read([*to_flags(DEFAULTS | recipe, parser), *flags])
        merged = [*to_flags(DEFAULTS | PRESETS.get(args.sfr_preset, {}) | recipe, parser), *flags]
        return recipe, [*merged, *pattern_flags(parser.read(merged))]


def read_settings(argv: Sequence[str]) -> Settings:
    """Merges recipes and flags, and adapts them to this machine. ValueError names the recipes."""
    recipes, flags = split_recipes(argv)
    recipe, flags = merge(recipes, flags)
    with naming(recipes):
        return _settings(recipe, flags)


def _settings(recipe: dict[str, Any], flags: list[str]) -> Settings:
    """The settings of one merged recipe and all flags of its run."""
    parser = flag_parser()
    args = parser.read(flags)
    if (steps := train_iters_of(vars(args))) is not None:
        flags += ["--train-iters", str(steps)]
    if args.save and not args.load:  # a run that is started again resumes
        flags += ["--load", args.save]
    if args.save and not args.tensorboard_dir:
        flags += ["--tensorboard-dir", os.path.join(args.save, "tensorboard")]
    flags += profile_flags(options(ProfileOptions, args), args, parser.read([]))
    if not args.valid_data_path and not args.data_path:
        flags += ["--eval-iters", "0"]
    backend = choose(args.sfr_backend)
    extra, changes = adapt_flags(backend, args)
    args = parser.read(flags := flags + extra)
    if found := refusal(args, vars(parser.read([]))):
        raise ValueError(found)
    check(args)
    saved = resolved(args, parser)
    if "sfr" in recipe:  # false tells that the options are meant to be unused
        saved.setdefault("sfr", False)
    elif not args.sfr and (given := [name for name in _term_options() if name in saved]):
        raise ValueError(
            f"{', '.join(given)}: no effect without SFR; set sfr: true to train with it, or sfr: false to keep them "
            "unused"
        )
    return Settings(flags, saved, backend, changes)


def _term_options() -> list[str]:
    """The options that only a run with SFR reads."""
    parts = (PresetOptions, SFROptions, TargetOptions, ScheduleOptions, GateOptions, FlowHeadOptions)
    return [name for part in (*parts, HeadOptimizerOptions) for name in option_names(part).values()]


def check(args: argparse.Namespace) -> None:
    """Checks what upstream does not. ValueError for values out of range and incompatible options."""
    for part in PARTS:
        options(part, args)
    check_objective(args)
    if found := contradiction(args):
        raise ValueError(found)


def parse(settings: Settings) -> argparse.Namespace:
    """Upstream's parsed, validated and globally set arguments."""
    argv, sys.argv = sys.argv, [sys.argv[0], *settings.flags]  # upstream's parser reads it and accepts no list
    try:
        args = parse_and_validate_args(extra_args_provider=add_options)
    except Exception as error:  # mostly an assertion; a zero or a huge number fails wherever upstream computes with it
        unset_num_microbatches_calculator()
        said = one_line(str(error)) or traceback.extract_tb(error.__traceback__)[-1].line
        kind = "" if isinstance(error, AssertionError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"Megatron refuses these flags: {kind}{said}") from error
    finally:
        sys.argv = argv
    if args.full_validation:  # upstream's sampler gives each data-parallel rank one sequence at a time
        args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.data_parallel_size
    # A weight that is 0 throughout leaves nothing to learn: no head is built, and the run is plain SFT bit for bit.
    args.sfr = args.sfr and args.sfr_weight > 0
    return args
