"""Checks of LoRA's options: against the other arguments of a run, and against the checkpoints that it loads."""

import argparse
from pathlib import Path
from typing import Any

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.model.lora.options import ADAPTER, LoRAOptions
from megatron_sfr.option_names import option_names
from megatron_sfr.storage.model_folders import check_config, find_gguf, weights_fingerprint

STORED = ("lora_rank", "lora_alpha", "lora_targets")
"""Options that the adapters of a checkpoint depend on."""


def lora_contradictions(args: argparse.Namespace) -> list[tuple[Any, str]]:
    """Incompatible options, as rows for `validation.contradiction`: (whether it is so, what to do)."""
    if args.lora_rank is None:
        defaults, names = LoRAOptions(), option_names(LoRAOptions)
        return [
            (getattr(args, option) != getattr(defaults, field), f"{option} has no effect without lora_rank: set both")
            for field, option in names.items()
        ]
    untried = {
        "training_task": args.training_task == "kl-flow",
        "multi_latent_attention": args.multi_latent_attention,
        "attention_output_gate": args.attention_output_gate,
        "mtp_num_layers": args.mtp_num_layers,
        "moe_shared_expert_overlap": args.moe_shared_expert_overlap,
        "moe_router_enable_expert_bias": args.moe_router_enable_expert_bias,
        "defer_embedding_wgrad_compute": args.defer_embedding_wgrad_compute,
        "delay_wgrad_compute": args.delay_wgrad_compute,
        "use_megatron_fsdp": args.use_megatron_fsdp,
        "use_torch_fsdp2": args.use_torch_fsdp2,
        "init_model_with_meta_device": args.init_model_with_meta_device,
        "fp8_param_gather": args.fp8_param_gather,
        "fp4_param_gather": args.fp4_param_gather,
        "spec": args.spec is not None,
        f"optimizer {args.optimizer}": args.optimizer not in ("adam", "sgd"),
    }
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return [
        *((wrong, f"{name} is not supported with lora_rank yet: leave one out") for name, wrong in untried.items()),
        (
            args.lora_base is None and args.sfr_hf_load is None,
            "lora_rank: the frozen weights are read at every start; name them as lora_base (a Megatron checkpoint) or "
            "sfr_hf_load (a Hugging Face folder)",
        ),
        (
            args.lora_base is not None and args.sfr_hf_load is not None,
            "lora_base and sfr_hf_load both name the frozen weights: leave one out",
        ),
        (
            groups and groups % args.tensor_model_parallel_size,
            f"lora_rank: tensor_model_parallel_size {args.tensor_model_parallel_size} cuts inside the {groups} groups "
            "of queries, keys and values: choose a divisor",
        ),
        (
            args.ckpt_format != "torch_dist",
            "lora_rank: checkpoints of adapters are written as torch_dist only: leave ckpt_format out",
        ),
    ]


def check_adapters(args: argparse.Namespace, path: str, checkpoint: Checkpoint) -> None:
    """Checks that a checkpoint and the run that loads it both have adapters (equal rank, scale and targets), or none.

    If the run resumes, its frozen weights have to be the same too.

    Raises:
        ValueError: they differ.
    """
    has_adapters = any(ADAPTER in key for key in checkpoint.tensors)
    if not has_adapters and args.lora_rank is None:
        return
    if not has_adapters:
        raise ValueError(
            f"{path} holds no adapters, and the run has lora_rank: name its weights as lora_base, and leave "
            "them out of load and pretrained_checkpoint"
        )
    stored = checkpoint.arguments()
    for name in STORED:
        now = getattr(args, name)
        if _comparable(name, now) != _comparable(name, stored.get(name, now)):
            raise ValueError(
                f"{path} holds adapters with {name} {stored[name]}, this run has {now}: set it to the "
                "same, or merge them into their base (`megatron-sfr convert export --merge`)"
            )
    base = stored.get("lora_base_fingerprint")
    if path == args.load and not args.finetune and base not in (None, args.lora_base_fingerprint):
        raise ValueError(
            f"the frozen weights in {args.lora_base or args.sfr_hf_load} are not those that the run in {path} has "
            "trained its adapters on: name those, or start another run (another save and pretrained_checkpoint: "
            f"{path})"
        )


def _comparable(name: str, value: Any) -> Any:
    """'all' and the names of all layers are the same targets."""
    return frozenset(LoRAOptions(targets=value).patterns) if name == "lora_targets" else value


def base_fingerprint(args: argparse.Namespace) -> str | None:
    """A hash that identifies the frozen weights; None without LoRA.

    Upstream stores it in checkpoints, with the arguments.
    """
    if args.lora_rank is None:
        return None
    folder = Path(args.lora_base or args.sfr_hf_load)
    if args.lora_base is not None:
        folder = find_checkpoint(folder)
    gguf = find_gguf(folder)
    if args.lora_base is None and gguf is None:
        check_config(folder)
    return weights_fingerprint([gguf] if gguf else [*folder.glob("*.safetensors"), *folder.glob("*.distcp")])
