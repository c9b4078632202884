"""The layer pattern of a hybrid model, and checks of it: against the other options of a run, and its checkpoints."""

import argparse
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

from megatron_sfr.hf.megatron.hybrid_names import PATTERN
from megatron_sfr.storage.user_files import cut

LAYER_SYMBOLS = "*-|"
"""Attention, MLP and the ends of pipeline stages: what the local specification builds."""
KERNELS = {
    "M": ("Mamba layers", ("mamba_ssm", "causal_conv1d")),
    "G": ("layers of gated delta net", ("fla",)),
}
"""Layers that megatron-core 0.19.2 computes with CUDA kernels only, and the packages with these kernels."""
NOT_IN_HYBRID = {
    "use_rope_scaling": "has no scaled rotary frequencies",
    "rotary_interleaved": "computes rotary frequencies for halves of a head only",
    "window_attn_skip_freq": "numbers attention and MLP separately, and this option counts layers of GPTModel",
    "no_rope_freq": "numbers attention and MLP separately, and this option counts layers of GPTModel",
    "mtp_num_layers": "computes the loss of multi-token prediction after the point at which ours starts",
    "fine_grained_activation_offloading": "marks the output layer by the flag that is off while ours runs",
}
"""Megatron's options that HybridModel of megatron-core 0.19.2 does not have, or that were not tried with it."""


def pattern_flags(args: argparse.Namespace) -> list[str]:
    """Flags for the pattern of a hybrid run that gives num_layers only: these layers of GPTModel, in equal stages."""
    if args.model_class != "hybrid" or args.hybrid_layer_pattern is not None or not args.num_layers:
        return []
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    if layers % stages:
        raise ValueError(
            f"num_layers {layers} are not divisible by pipeline_model_parallel_size {stages}: set {PATTERN}, with a | "
            "where a stage ends"
        )
    stage = ("*E" if args.num_experts else "*-") * (layers // stages)
    return ["--hybrid-layer-pattern", "|".join([stage] * stages)]


def model_contradictions(args: argparse.Namespace, separator: str | None) -> list[tuple[Any, str]]:
    """Incompatible options, as rows for `validation.contradiction`: (whether it is so, what to do).

    separator: the option that puts several texts into a sequence, or None.
    """
    if args.model_class == "gpt":
        layout = args.pipeline_model_parallel_layout or "m"
        apart = args.mtp_num_layers and "m" not in layout.rpartition("|")[2]
        return [
            (
                apart,
                f"pipeline_model_parallel_layout = {layout}: multi-token prediction is supported in the stage of the "
                "loss only; put m before L in the last stage",
            )
        ]
    pattern, what = args.hybrid_layer_pattern or "", "model_class = hybrid"
    recurrent = sorted(set(pattern) & KERNELS.keys())
    local = sorted(set(pattern) - set(LAYER_SYMBOLS) - KERNELS.keys())
    return [
        (not pattern, f"{what}: set num_layers, or {PATTERN} (* is attention, - an MLP)"),
        (
            args.training_task == "kl-flow",
            f"{what} is for autoregressive training: --training-task kl-flow replaces parts of GPTModel; leave it out",
        ),
        *(
            (getattr(args, name), f"{name} is not supported with {what}: HybridModel {reason}; leave it out")
            for name, reason in NOT_IN_HYBRID.items()
        ),
        (
            args.lora_rank,
            f"lora_rank is not supported with {what}: adapters were not tried with HybridModel; leave one of them out",
        ),
        (
            "/" in pattern,
            f"{PATTERN} {pattern}: multi-token prediction (/) is not supported with {what} yet: leave it out",
        ),
        (
            "E" in pattern and not args.num_experts,
            f"{PATTERN} {pattern} has layers of experts (E): set num_experts",
        ),
        *((args.transformer_impl == "local", message) for message in _needs_gpu(pattern)),
        (
            local and args.transformer_impl == "local",
            f"{PATTERN} {pattern}: layers {', '.join(local)} need Transformer Engine or CUDA kernels; "
            "the local specification has attention (*) and MLPs (-)",
        ),
        (
            recurrent and separator,
            f"{separator} has not been tried with layers {', '.join(recurrent)}, whose state would have to restart at "
            "each text: leave it out",
        ),
    ]


def _needs_gpu(pattern: str) -> Iterator[str]:
    """A message for each kind of layers in a pattern that does not run on a CPU."""
    for symbol, (layers, packages) in KERNELS.items():
        if symbol in pattern:
            needed = f"package{'s' * (len(packages) > 1)} {' and '.join(packages)}"
            missing = ", ".join(name for name in packages if find_spec(name) is None)
            said = f" (not installed: {missing})" if missing else ""
            yield (
                f"{PATTERN} {cut(pattern)}: {layers} ({symbol}) need a GPU and the {needed}{said}: they cannot be "
                "trained on a CPU"
            )


def check_stored_model(args: argparse.Namespace, path: str, stored: Mapping[str, Any]) -> bool:
    """Checks that a run's model loads a checkpoint.

    Args:
        stored: the arguments of the run that wrote the checkpoint; empty for an import of GPTModel's layers.
    Returns:
        Whether upstream translates it from GPTModel's names to those of a hybrid model.
    Raises:
        ValueError: they have other layers, or the checkpoint is a hybrid model's and the run's model is not.
    """
    pattern, run = stored.get(PATTERN), args.hybrid_layer_pattern
    if run is None and pattern is not None:
        raise ValueError(
            f"{path} holds a model with {PATTERN} {pattern}, this run has model_class gpt: set model_class to hybrid"
        )
    if run is None:
        return False
    if pattern is not None:
        if pattern.replace("|", "") != run.replace("|", ""):
            raise ValueError(f"{path} holds a model with {PATTERN} {pattern}, this run has {run}: set it to the same")
        return False
    try:
        layers = gpt_compatible_layer_maps(run).num_gpt_layers
    except ValueError as error:
        raise ValueError(f"{path} holds a GPTModel, which does not fit this run: {error}") from error
    if stored.get("num_layers", layers) != layers:
        raise ValueError(
            f"{path} holds a GPTModel of {stored['num_layers']} layers, this run has {PATTERN} {run} with {layers} of "
            "its attentions and MLPs: set num_layers or the pattern to the same"
        )
    return True
