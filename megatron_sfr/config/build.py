"""From arguments to what is trained: the model with its head, and the forward step with its objective and its term."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.checkpointing import checkpoint_exists

from megatron_sfr.config.settings import options
from megatron_sfr.config.validation import separator
from megatron_sfr.data.prepared.open import horizons_of, open_prepared
from megatron_sfr.data.targets.statistics import pooled_statistics
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.hf.end_tokens import end_tokens_of
from megatron_sfr.hf.load_at_start import start_from
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.tracker import newest
from megatron_sfr.kl_flow.checkpoint import denoiser_config
from megatron_sfr.kl_flow.corruption import KLFlowOptions
from megatron_sfr.kl_flow.kl_flow_step import KLFlowStep
from megatron_sfr.kl_flow.model import KLFlowModelConfig
from megatron_sfr.model.builder import SFRModelConfig
from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
from megatron_sfr.model.local_spec import local_block_spec
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.objectives.token.gem import GEMOptions
from megatron_sfr.objectives.token.registry import OBJECTIVES
from megatron_sfr.objectives.token.sed import SEDOptions
from megatron_sfr.runtime.backend import adapt_config
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.data.provider import DataProvider
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.lock_fork import LockFork, LockForkOptions


def model_config(args: argparse.Namespace, backend: Literal["cpu", "cuda"]) -> SFRModelConfig | KLFlowModelConfig:
    """The model to build. With --sfr opens the target stores, to learn what they hold."""
    if args.training_task == "kl-flow":
        denoiser = denoiser_config(args)
        adapt_config(backend, denoiser)
        return denoiser
    config = gpt_config_from_args(args, model_config_cls=SFRModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor  # megatron-core 0.19.2 leaves its own 8 there
    adapt_config(backend, config)
    if separator(args) is not None:
        config.transformer.masked_softmax_fusion = False  # the fused causal softmax does not read a mask
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = local_block_spec
    if args.sfr:
        config.head = head_plan(args)
    if args.sfr_hf_load is not None and not checkpoint_exists(args.load):
        config.pre_wrap_hooks.append(start_from(Path(args.sfr_hf_load), args))
    return config


def check_task(args: argparse.Namespace) -> Mapping[str, Any]:
    """The arguments of the run whose checkpoint --load holds; empty where it holds none.

    ValueError where the run starts from a model of another task: upstream would take from it whatever fits.
    """
    arguments: dict[str, Mapping[str, Any]] = {}
    paths = [path for path in (args.load, args.pretrained_checkpoint) if checkpoint_exists(path)]
    for path in paths if args.ckpt_format == "torch_dist" else []:
        try:
            found = newest(Path(path))
            folder = Path(path, f"iter_{args.ckpt_step:07d}") if args.ckpt_step else found and found.folder
            stored = Checkpoint(find_checkpoint(folder or Path(path))).arguments()
        except ValueError:  # of a format that upstream reads and we do not: upstream says so, or continues
            continue
        arguments[path] = stored
        task = stored.get("training_task", "autoregressive")
        if task != args.training_task:
            raise ValueError(
                f"{path} holds a model of --training-task {task}, this run is {args.training_task}: give another "
                "--load or --pretrained-checkpoint, or another --save"
            )
    return arguments.get(args.load, {})


def unknown_end(args: argparse.Namespace) -> str | None:
    """A warning where the replies of the data end on tokens that the model to start from does not stop at."""
    start = args.sfr_hf_load or args.pretrained_checkpoint or args.load
    known = end_tokens_of(Path(start)) if start else ()
    if not known or not (unknown := [id for id in args.reply_end_tokens if id not in known]):
        return None
    return (
        f"the replies of the data end on token {', '.join(map(str, unknown))}, and {start} stops at "
        f"{', '.join(map(str, known))} alone: `megatron-sfr convert export` adds it to generation_config.json; other "
        "ways to save the model have to do the same"
    )


def forward_step(args: argparse.Namespace, data: DataProvider) -> ForwardStep | KLFlowStep:
    """The forward step for these arguments and the provider of the datasets."""
    if args.training_task == "kl-flow":
        kl_flow = options(KLFlowOptions, args)
        return KLFlowStep(args.vocab_size, args.seq_length, kl_flow, time_everywhere=args.kl_flow_time == "adaln")
    objective = OBJECTIVES[args.objective](options(GEMOptions, args), options(SEDOptions, args))
    term = None
    if args.sfr:
        sfr, targets = options(SFROptions, args), options(TargetOptions, args)
        term = FlowTerm(TermOptions(sfr, targets, options(GateOptions, args), options(FlowHeadOptions, args)))
    resets_attention = separator(args) is not None
    lock_fork = LockFork(options(LockForkOptions, args), options(TargetOptions, args))
    schedule = options(ScheduleOptions, args)
    return ForwardStep(args.vocab_size, args.objective, objective, term, schedule, resets_attention, data, lock_fork)


def head_plan(args: argparse.Namespace) -> FlowHeadPlan:
    """The head that goes with the targets; ValueError where the stores of a blend do not fit one head."""
    head, targets = options(FlowHeadOptions, args), options(TargetOptions, args)
    paths = [Path(x) for x in (args.train_data_path or args.data_path) if not _is_number(x)]  # blends have weights
    online = args.sfr_targets == "online"
    stores = [TargetStore.open(path / args.sfr_target_store, open_prepared(path), partial=online) for path in paths]
    dims = {store.dim for store in stores}
    if len(dims) > 1 or head.sfr_target_dim not in (None, *dims):
        raise ValueError(f"target stores of dimension {sorted(dims)} do not fit one head (--sfr-target-dim)")
    whiten = targets.sfr_target_scale == "whiten" and targets.sfr_whiten == "store"
    if whiten and (open_ones := [store.folder for store in stores if not store.manifest.complete]):
        raise ValueError(f"{open_ones[0]} is not complete, so its statistics are not known: set sfr_whiten to ema")
    starts_from_other = args.finetune or (args.pretrained_checkpoint and not checkpoint_exists(args.load))
    return FlowHeadPlan(
        head,
        dim=dims.pop(),
        horizons=len(horizons_of(paths)),
        has_network=args.sfr_loss != "cka",
        gate_bins=args.sfr_gate_bins,
        clipped_apart=args.sfr_weight_on == "hidden",
        weight=args.sfr_weight,
        seed=args.seed,
        fresh=bool(args.sfr_fresh_head and starts_from_other),
        statistics=pooled_statistics(stores) if whiten else None,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
