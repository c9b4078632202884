"""Incompatible options: combinations of arguments that cannot work, each with a remedy. Upstream checks its own."""

import argparse
import math
from typing import Any

from megatron_sfr.config.long_sequence_checks import chunk_contradictions, context_contradictions, fp8_contradictions
from megatron_sfr.config.lora_checks import lora_contradictions
from megatron_sfr.config.model_class_checks import model_contradictions
from megatron_sfr.training.data.epochs import split_blend
from megatron_sfr.training.lm_head import CHUNK_TOKENS

Rows = list[tuple[Any, str]]
RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
NOT_NEGATIVE = (*RATES, "weight_decay", "clip_grad", "adam_eps")
BETAS = ("adam_beta1", "adam_beta2")


def contradiction(args: argparse.Namespace) -> str | None:
    """The first incompatible combination among parsed arguments, in one line; None if there is none."""
    rows = _of_the_run(args) + _of_the_start(args) + _of_validation_sets(args)
    rows += model_contradictions(args, separator(args))
    rows += _of_separation(args) + lora_contradictions(args) + chunk_contradictions(args)
    rows += context_contradictions(args, separator(args)) + fp8_contradictions(args)
    rows += _of_the_term(args) if args.sfr else []
    rows += _of_kl_flow(args) if args.training_task == "kl-flow" else []
    return next((message for wrong, message in rows if wrong), None)


def _of_the_run(args: argparse.Namespace) -> Rows:
    numbers = {name: value for name, value in vars(args).items() if isinstance(value, float)}
    wrong = [name for name, x in numbers.items() if math.isnan(x) or (name in RATES and math.isinf(x))]
    negative = [name for name in NOT_NEGATIVE if numbers.get(name, 0) < 0]
    betas = [name for name in BETAS if not 0 <= numbers.get(name, 0) < 1]
    return [
        (wrong, f"{', '.join(wrong)}: not a finite number; give one"),
        (negative, f"{', '.join(negative)}: below 0; give at least 0"),
        (betas, f"{', '.join(betas)}: give at least 0 and less than 1"),
        (
            args.lr is not None and args.min_lr > args.lr,
            f"min_lr = {args.min_lr:g} is above lr = {args.lr}: lower it, or raise lr",
        ),
        (
            args.train_iters is not None and args.train_iters < 1,
            f"train_iters = {args.train_iters}: give at least 1",
        ),
        (
            not args.calculate_per_token_loss,
            "--no-calculate-per-token-loss: every term here is a sum over the global batch; leave it on",
        ),
        (
            args.sfr_fresh_head and not (args.finetune or args.pretrained_checkpoint),
            "--sfr-fresh-head goes with --load DIR --finetune, or with --pretrained-checkpoint DIR",
        ),
        (
            args.keep_checkpoints is not None and (args.save is None or args.ckpt_format != "torch_dist"),
            "keep_checkpoints deletes checkpoints of a --save folder in the format torch_dist: leave it out",
        ),
        (
            args.keep_checkpoints is not None and args.save_retain_interval is not None,
            "save_retain_interval deletes what keep_checkpoints keeps: set keep_every instead",
        ),
        (args.vocab_size is None, "--vocab-size is missing; `megatron-sfr convert recipe --hf DIR` prints it"),
        (
            not (args.train_data_path or args.data_path),
            "no training data: set train_data_path to a folder that `megatron-sfr prepare` wrote",
        ),
        (
            args.lr_warmup_iters >= (args.lr_decay_iters or args.train_iters or math.inf) > 0,
            f"lr_warmup_iters = {args.lr_warmup_iters} has to end before the schedule of the learning rate does: "
            "shorten it, or raise train_iters",
        ),
    ]


def _of_the_start(args: argparse.Namespace) -> Rows:
    if args.sfr_hf_load is None:
        return []
    sharded = args.use_megatron_fsdp or args.use_torch_fsdp2
    return [
        (
            args.pretrained_checkpoint is not None and args.lora_rank is None,  # with LoRA it holds adapters
            "--sfr-hf-load and --pretrained-checkpoint both say where to start: leave one out",
        ),
        (
            args.exit_on_missing_checkpoint and args.lora_rank is None,
            "--sfr-hf-load starts a run that has no checkpoint, --exit-on-missing-checkpoint ends it: leave one out",
        ),
        (
            sharded or args.fp8_param_gather or args.fp4_param_gather or args.init_model_with_meta_device,
            "--sfr-hf-load fills plain parameters, not what FSDP shards nor what is kept in FP8 or FP4: `megatron-sfr "
            "convert import`, then --pretrained-checkpoint",
        ),
    ]


def _of_validation_sets(args: argparse.Namespace) -> Rows:
    paths, names = args.valid_data_path or [], args.validation_set_names or []
    complete, several = args.full_validation, args.multiple_validation_sets
    return [
        (
            several and not complete,
            "multiple_validation_sets: Megatron evaluates several sets only completely; set full_validation too",
        ),
        (
            complete and not paths,
            "full_validation needs validation data by path: set valid_data_path",
        ),
        (
            complete and args.test_data_path,
            "full_validation: Megatron would read as many test batches as the validation data have; name the test data "
            "in valid_data_path, and the sets in validation_set_names",
        ),
        (
            complete and split_blend(paths)[1] is not None,
            "full_validation reads each validation folder once: leave the weights in valid_data_path out",
        ),
        (
            complete and {args.eval_micro_batch_size, args.eval_global_batch_size} != {None},
            "full_validation evaluates one sequence at a time on each data-parallel rank: leave eval_micro_batch_size "
            "and eval_global_batch_size out",
        ),
        (
            names and not several,
            "validation_set_names are for several sets: set multiple_validation_sets and full_validation too",
        ),
        (
            names and (len(names) != len(paths) or len(set(names)) < len(names)),
            f"validation_set_names: give one name to each of the {len(paths)} folders in valid_data_path, all distinct",
        ),
    ]


def separator(args: argparse.Namespace) -> str | None:
    """The option that puts several texts into a sequence, each with its own attention; None without one."""
    if args.sfr_packing != "none":
        return "sfr_packing"
    return "dataloader_inter_document_masking" if args.dataloader_inter_document_masking else None


def _of_separation(args: argparse.Namespace) -> Rows:
    if (option := separator(args)) is None:
        return []
    local = args.transformer_impl == "local"
    return [
        (
            args.sfr_packing != "none" and args.dataloader_inter_document_masking,
            "sfr_packing is for conversations, dataloader_inter_document_masking for documents: set one of them",
        ),
        (
            local and args.window_size is not None,
            f"{option} with window_size needs Transformer Engine: upstream's local attention replaces the mask of "
            "the texts by the window's",
        ),
        (
            not local and args.micro_batch_size != 1,
            f"{option} with Transformer Engine takes one sequence at a time: set micro_batch_size to 1",
        ),
        (
            not local and args.eval_micro_batch_size not in (None, 1),
            f"{option} with Transformer Engine takes one sequence at a time: set eval_micro_batch_size to 1",
        ),
        (
            args.sfr and args.sfr_loss == "cka" and option == "sfr_packing",
            "sfr_loss = cka compares the anchors of one conversation: set sfr_packing to none",
        ),
    ]


def _of_the_head(args: argparse.Namespace) -> Rows:
    """Options of the head's optimizer that would have no effect."""
    own_clip, own_rate = args.sfr_clip_grad is not None, args.sfr_head_lr_mult != 1
    return [
        (
            own_clip and args.sfr_weight_on == "loss",
            "sfr_clip_grad: with sfr_weight_on = loss (so in the reference preset) head and backbone are clipped "
            "together; leave it out, or set sfr_weight_on to hidden",
        ),
        (
            own_clip and args.clip_grad == 0,
            "sfr_clip_grad has no effect at clip_grad = 0, where nothing is clipped: set clip_grad above 0",
        ),
        (
            (own_clip or own_rate) and args.sfr_loss == "cka",
            "sfr_loss = cka has no head: leave sfr_clip_grad and sfr_head_lr_mult out",
        ),
        (
            own_rate and args.use_mup,
            "sfr_head_lr_mult does not work with use_mup, which sets the learning rates of all parameters",
        ),
    ]


def _of_the_term(args: argparse.Namespace) -> Rows:
    layer = args.sfr_layer is not None
    return [
        *_of_the_head(args),
        (
            args.sfr_targets == "online" and args.dataloader_type not in (None, "single"),
            "sfr_targets = online looks ahead in the order of dataloader_type single: leave dataloader_type out",
        ),
        (
            args.sfr_targets == "online" and args.phase_transition_iterations,
            "sfr_targets = online does not know phase_transition_iterations: embed the data, or leave them out",
        ),
        (
            args.sfr_loss == "cka" and (args.sfr_gate != "none" or args.sfr_ema != "none" or args.sfr_warmup_steps > 0),
            "sfr_loss = cka has no head: sfr_gate and sfr_ema must be none, and sfr_warmup_steps 0",
        ),
        (
            args.sfr_ema != "none" and args.sfr_warmup_steps == 0 and args.sfr_preset is None,
            f"sfr_ema = {args.sfr_ema} averages the head from the end of phase A on: set sfr_warmup_steps above 0, or "
            "the average starts from an untrained head",
        ),
        (
            args.sfr_ema == "smooth" and (args.use_precision_aware_optimizer or args.optimizer_cpu_offload),
            "sfr_ema = smooth needs the optimizer's fp32 weights: leave out use_precision_aware_optimizer and "
            "optimizer_cpu_offload",
        ),
        (
            layer and args.sfr_weight_control == "ratio",
            "sfr_weight_control = ratio compares gradients after the last layer: leave sfr_layer out",
        ),
        (
            layer and args.recompute_granularity == "full",
            "sfr_layer needs a layer's output, which full recomputation drops: use recompute_granularity selective",
        ),
    ]


def _of_kl_flow(args: argparse.Namespace) -> Rows:
    """Combinations that the method excludes, and combinations that have not been tried."""
    autoregressive = {
        "sfr": (args.sfr, "leave --sfr out"),
        "objective": (args.objective != "ce", "set objective to ce"),
        "loss_chunk_tokens": (args.loss_chunk_tokens != CHUNK_TOKENS, "leave it out"),
        "sfr_lock_fork_interval": (args.sfr_lock_fork_interval > 0, "leave it out"),
        "mtp_num_layers": (args.mtp_num_layers, "leave it out"),
        "sfr_hf_load": (args.sfr_hf_load is not None, "no Hugging Face model starts it; leave it out"),
    }
    unknown = {
        "sfr_packing": args.sfr_packing != "none",
        "dataloader_inter_document_masking": args.dataloader_inter_document_masking,
        "eod_mask_loss": args.eod_mask_loss,
        "fp8_format": args.fp8,
        "fp4_format": args.fp4,
        "num_experts": args.num_experts,
        "window_size": args.window_size is not None,
        "multi_latent_attention": args.multi_latent_attention,
        "use_mup": args.use_mup,
        "spec": args.spec is not None,
        "init_model_with_meta_device": args.init_model_with_meta_device,
        "use_megatron_fsdp": args.use_megatron_fsdp,
        "use_torch_fsdp2": args.use_torch_fsdp2,
    }
    task = "--training-task kl-flow"
    return [
        *(
            (wrong, f"{name} is for autoregressive training, not {task}: {do}")
            for name, (wrong, do) in autoregressive.items()
        ),
        *((wrong, f"{name} is not supported with {task} yet: leave it out") for name, wrong in unknown.items()),
        (
            args.position_embedding_type != "rope",
            f"{task} masks nothing, so order must come from rotary positions: set position_embedding_type to rope",
        ),
        (
            args.tensor_model_parallel_size > 1 and args.make_vocab_size_divisible_by % 4,
            f"{task} draws noise in blocks of 4: set make_vocab_size_divisible_by to a multiple of 4",
        ),
        *_of_modulated_norms(args),
    ]


def _of_modulated_norms(args: argparse.Namespace) -> Rows:
    if args.kl_flow_time != "adaln":
        return []
    full = args.recompute_granularity == "full"
    norms = args.recompute_granularity == "selective" and "layernorm" in (args.recompute_modules or ())
    return [
        (
            full or norms,
            "kl_flow_time = adaln: recomputed norms would read a later microbatch's time; set kl_flow_time to token, "
            "or recompute_granularity to selective without layernorm",
        ),
        (
            args.transformer_impl != "local",
            "kl_flow_time = adaln needs norms apart from products, which Transformer Engine fuses: set kl_flow_time to "
            "token, or transformer_impl to local",
        ),
    ]
