"""Builds what a run trains, from its plan: the model with its head, and the forward step. Checks its checkpoints."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.training.checkpointing import checkpoint_exists
from megatron.training.global_vars import get_wandb_writer

from megatron_sfr.config.lora_checks import base_fingerprint, check_adapters
from megatron_sfr.config.model_class_checks import check_stored_model
from megatron_sfr.config.resume import changed_model
from megatron_sfr.config.run_plan import RunPlan
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import holds_documents, horizons_of, open_prepared
from megatron_sfr.data.targets.statistics import pooled_statistics
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.hf.end_tokens import end_tokens_of
from megatron_sfr.hf.gguf.gguf_file import read_header
from megatron_sfr.hf.load_at_start import base_from, start_from
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import check_imported
from megatron_sfr.hf.megatron.tracker import newest, step_folder
from megatron_sfr.kl_flow.checkpoint import denoiser_config
from megatron_sfr.kl_flow.kl_flow_step import KLFlowStep
from megatron_sfr.kl_flow.model import KLFlowModelConfig
from megatron_sfr.model.builder import (
    SFRHybridConfig,
    SFRModelConfig,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron_sfr.model.flow_head import FlowHeadPlan
from megatron_sfr.model.local_spec import local_block_spec, local_hybrid_spec
from megatron_sfr.model.lora.attach import attach_adapters
from megatron_sfr.runtime.backend import adapt_config
from megatron_sfr.storage.model_folders import find_gguf, vocabulary_of
from megatron_sfr.training.auxiliary_loss import FlowTerm
from megatron_sfr.training.bridge import flow_head_plan
from megatron_sfr.training.data.epochs import split_blend
from megatron_sfr.training.data.prepared_check import prepared_folders
from megatron_sfr.training.data.provider import DataProvider
from megatron_sfr.training.forward_step import ForwardStep
from megatron_sfr.training.lock_fork import LockFork
from megatron_sfr.training.metrics_log import JsonLines
from megatron_sfr.training.persona_metrics import PersonaMetrics


def model_config(plan: RunPlan) -> SFRModelConfig | SFRHybridConfig | KLFlowModelConfig:
    """The model to build. With a flow head, opens the target stores to read their dimension."""
    args = plan.megatron
    if plan.is_kl_flow:
        denoiser = denoiser_config(args)
        adapt_config(plan.backend, denoiser)
        return denoiser
    config = _gpt_config(args) if plan.model.model_class == "gpt" else _hybrid_config(args)
    adapt_config(plan.backend, config)
    if plan.separator is not None:
        config.transformer.masked_softmax_fusion = False  # the fused causal softmax does not read a mask
    if plan.data.sfr:
        config.head = head_plan(plan)
    lora = plan.lora if plan.lora.rank is not None else None
    if plan.start.hf_load is not None and (lora or not checkpoint_exists(args.load)):
        config.pre_wrap_hooks.append(start_from(Path(plan.start.hf_load), args))
    if lora is not None:  # a checkpoint to load has no base weights: they are read first, at every start
        if lora.base is not None:
            config.pre_wrap_hooks.append(base_from(Path(lora.base), args))
        config.pre_wrap_hooks.append(attach_adapters(lora, args.seed))
    return config


def _gpt_config(args: argparse.Namespace) -> SFRModelConfig:
    config: SFRModelConfig = gpt_config_from_args(args, model_config_cls=SFRModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor  # megatron-core 0.19.2 leaves its own 8 there
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = local_block_spec
    return config


def _hybrid_config(args: argparse.Namespace) -> SFRHybridConfig:
    config: SFRHybridConfig = hybrid_config_from_args(args, model_config_cls=SFRHybridConfig)
    if args.transformer_impl == "local" and args.spec is None:
        config.hybrid_stack_spec = local_hybrid_spec(config.transformer)
    return config


def check_task(args: argparse.Namespace) -> tuple[Mapping[str, Any], list[str]]:
    """Checks that the checkpoints that a run loads are of the same task and model, with adapters if it has adapters.

    Upstream would load whatever fits of another task's model.

    Returns:
        The arguments of the run that wrote the checkpoint in --load (empty if it cannot be read), and warnings.
    Raises:
        ValueError: a checkpoint was written by another task, or has other layers or adapters.
    """
    arguments: dict[str, Mapping[str, Any]] = {}
    warnings: list[str] = []
    args.lora_base_fingerprint = base_fingerprint(args)
    paths = [path for path in (args.load, args.pretrained_checkpoint) if checkpoint_exists(path)]
    for path in paths if args.ckpt_format == "torch_dist" else []:
        try:
            found = newest(Path(path))
            folder = Path(path, step_folder(args.ckpt_step)) if args.ckpt_step else found and found.folder
            checkpoint = Checkpoint(find_checkpoint(folder or Path(path)))
            stored = checkpoint.arguments()
        except ValueError as error:  # of another format, or damaged: upstream loads it, or ends there
            warnings.append(f"{path} was not compared with the task and the model of this run ({error})")
            continue
        check_adapters(args, path, checkpoint)
        if check_stored_model(args, path, stored) and (args.finetune or not checkpoint_exists(args.load)):
            args.no_load_optim = True  # megatron-core 0.19.2 loads it from GPTModel's checkpoint, weights only or not
        arguments[path] = stored
        task = stored.get("training_task", "autoregressive")
        if task != args.training_task:
            raise ValueError(
                f"{path} holds a model of --training-task {task}, this run is {args.training_task}: give another "
                "--load or --pretrained-checkpoint, or another --save"
            )
        check_imported(vars(args), checkpoint)
        warnings += changed_model(args, path, stored)
    return arguments.get(args.load, {}), warnings


def dequantized_start(args: argparse.Namespace) -> str | None:
    """A warning if the run starts from a quantized GGUF file; None otherwise."""
    gguf = find_gguf(Path(args.sfr_hf_load)) if args.sfr_hf_load else None
    header = None if gguf is None else read_header(gguf)
    return str(header) if header is not None and header.is_quantized else None


def unknown_end(args: argparse.Namespace) -> str | None:
    """A warning if replies of the data end with tokens that the starting model does not stop at; None otherwise."""
    start = _start(args)
    known = end_tokens_of(start) if start else ()
    if not known or not (unknown := [id for id in args.reply_end_tokens if id not in known]):
        return None
    return (
        f"the replies of the data end on token {', '.join(map(str, unknown))}, and {start} stops at "
        f"{', '.join(map(str, known))} alone: `megatron-sfr convert export` adds it to generation_config.json; other "
        "ways to save the model have to do the same"
    )


def other_tokenizer(args: argparse.Namespace) -> str | None:
    """A warning if data were prepared with another tokenizer than the starting model has; None otherwise.

    That is, if both have a tokenizer.json, and these have different vocabularies.
    """
    start = _start(args)
    if start is None or (known := vocabulary_of(start)) is None:
        return None
    for folder in prepared_folders(args):
        given = Path(open_prepared(folder).manifest.tokenizer)
        if vocabulary_of(given) not in (None, known):
            return f"{folder} was prepared with the tokenizer in {given}, whose vocabulary is not that of {start}"
    return None


def _start(args: argparse.Namespace) -> Path | None:
    """The folder from which a run starts; None if it starts from random weights."""
    start = args.sfr_hf_load or args.lora_base or args.pretrained_checkpoint or args.load
    return Path(start) if start else None


def forward_step(plan: RunPlan, data: DataProvider, lines: JsonLines | None = None) -> ForwardStep | KLFlowStep:
    """The forward step of a run whose datasets `data` provides. lines: where it writes the metrics by persona."""
    args = plan.megatron
    if plan.is_kl_flow:
        everywhere = plan.kl_flow_model.time == "adaln"
        paths = prepared_folders(args)
        end = PreparedDocuments.open(paths[0]).manifest.eod if holds_documents(paths[0]) else None
        return KLFlowStep(args.vocab_size, args.seq_length, plan.kl_flow, everywhere, end)
    return ForwardStep(
        args.vocab_size,
        plan.objective,
        plan.token_loss,
        FlowTerm(plan.term) if plan.data.sfr else None,
        plan.schedule,
        resets_attention=plan.separator is not None,
        data=data,
        lock_fork=LockFork(plan.lock_fork, plan.term.targets),
        chunk_tokens=plan.loss_chunk_tokens,
        personas=PersonaMetrics(lambda: data.groups, lines, get_wandb_writer),
        divides_documents=plan.data.packing != "none" and args.context_parallel_size > 1,
    )


def head_plan(plan: RunPlan) -> FlowHeadPlan:
    """The head for the target stores of a run. Raises ValueError if they do not fit one head."""
    args, head, targets = plan.megatron, plan.term.head, plan.term.targets
    paths, _ = split_blend(args.train_data_path or args.data_path)
    store, online = plan.data.target_store, plan.data.targets == "online"
    stores = [TargetStore.open(path / store, open_prepared(path), partial=online) for path in paths]
    dims = {store.dim for store in stores}
    if len(dims) > 1 or head.target_dim not in (None, *dims):
        raise ValueError(f"target stores of dimension {sorted(dims)} do not fit one head (--sfr-target-dim)")
    whiten = targets.scale == "whiten" and targets.whiten == "store"
    if whiten and (incomplete := [store.folder for store in stores if not store.manifest.complete]):
        raise ValueError(f"{incomplete[0]} is not complete, so its statistics are not known: set sfr_whiten to ema")
    starts_from_other = args.finetune or (args.pretrained_checkpoint and not checkpoint_exists(args.load))
    return flow_head_plan(
        dims.pop(),
        plan.term,
        plan.schedule,
        horizons=len(horizons_of(paths)),
        seed=args.seed,
        fresh=bool(plan.load.fresh_head and starts_from_other),
        statistics=pooled_statistics(stores) if whiten else None,
    )
