"""Loads a trained denoiser of KL-flow for sampling, from a checkpoint of any parallel layout."""

import argparse
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.training.arguments import add_megatron_arguments

from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.kl_flow.corruption import KLFlowOptions
from megatron_sfr.kl_flow.model import KLFlowModelBuilder, KLFlowModelConfig, KLFlowModelOptions
from megatron_sfr.model.builder import gpt_config_from_args
from megatron_sfr.option_names import to_arguments
from megatron_sfr.runtime.backend import UNFUSED, adapt_config, changes_for, device, join

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
LAYOUT = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    UNFUSED.dest: UNFUSED.value,
}


def denoiser_config(args: argparse.Namespace) -> KLFlowModelConfig:
    """The model that the arguments of a KL-flow run describe."""
    config = gpt_config_from_args(args, model_config_cls=KLFlowModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor  # megatron-core 0.19.2 leaves its own 8 there
    config.time, config.time_scale, config.seed = args.kl_flow_time, args.kl_flow_time_scale, args.seed
    return config


def _defaults() -> dict[str, Any]:
    """Upstream's defaults and those of KL-flow's options, for arguments that a checkpoint does not hold."""
    upstream = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return vars(upstream.parse_args([])) | to_arguments(KLFlowModelOptions()) | to_arguments(KLFlowOptions())


def _arguments(folder: Path, backend: Literal["cpu", "cuda"], ranks: int) -> argparse.Namespace:
    """Arguments of the run that wrote a checkpoint, for this many ranks; values that are not plain have defaults."""
    stored = {name: value for name, value in Checkpoint(folder).arguments().items() if isinstance(value, PLAIN)}
    if stored.get("training_task") != "kl-flow":
        raise ValueError(f"{folder} holds no KL-flow model: train one with --training-task kl-flow")
    args = argparse.Namespace(**_defaults() | stored | LAYOUT)
    for change in changes_for(backend, args):
        setattr(args, change.dest, change.value)
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    args.tensor_model_parallel_size = args.tensor_parallel_num_weight_shards = ranks
    args.make_vocab_size_divisible_by = math.lcm(4, args.make_vocab_size_divisible_by)  # noise comes in blocks of 4
    args.padded_vocab_size = None  # the builder pads for these ranks
    return args


def load_denoiser(path: Path, backend: Literal["cpu", "cuda"]) -> tuple[MegatronModule, argparse.Namespace]:
    """The model, ready for `model.kl_flow.denoise`, and the arguments of the run that wrote it.

    Each of torchrun's ranks gets a tensor-parallel shard; without torchrun this process is the only rank. The
    vocabulary is args.vocab_size, the columns of all shards args.padded_vocab_size, the smoothing b
    args.kl_flow_smoothing, the last time args.kl_flow_t_max.
    Args: path: a --save folder, or one checkpoint in it. Raises ValueError if it is not a KL-flow checkpoint.
    """
    folder = find_checkpoint(path)
    join(backend)
    args = _arguments(folder, backend, ranks=dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(args.seed)
    config = denoiser_config(args)
    adapt_config(backend, config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = KLFlowModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    if args.bf16 or args.fp16:
        model.to(args.params_dtype)
    _fill(model, Checkpoint(folder))
    args.padded_vocab_size = dist.get_world_size() * len(model.embedding.word_embeddings.weight)
    return model.to(device()).eval(), args


@torch.no_grad()
def _fill(model: MegatronModule, checkpoint: Checkpoint) -> None:
    """Reads every parameter in place, from the chunks under which upstream would store it."""
    stacked = "decoder.layers.0.mlp.linear_fc2.weight" not in checkpoint.tensors
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": group, "non_homogeneous_layers": not stacked})
    apply_factories(sharded)
    for part in nested_values(sharded):
        if isinstance(part, ShardedTensor):
            if part.key not in checkpoint.tensors:
                raise ValueError(f"{checkpoint.folder} has no {part.key}: its model has another architecture")
            _read(part, checkpoint)


def _read(part: ShardedTensor, checkpoint: Checkpoint) -> None:
    """Fills one parameter; of a vocabulary that another layout padded less, what is not stored is 0."""
    size = (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape)
    stored = checkpoint.tensors[part.key].size
    room = [max(0, min(n, whole - at)) for n, whole, at in zip(size, stored, part.global_offset, strict=True)]
    found = checkpoint.read(part.key, part.global_offset, room) if all(room) else torch.empty(room)
    missing = [(0, n - here) for n, here in zip(size, room, strict=True)]
    assert part.allow_shape_mismatch or list(size) == room, f"{part.key}: {tuple(stored)} does not hold {size}"
    part.data.copy_(F.pad(found, [n for pair in reversed(missing) for n in pair]).view(part.local_shape))
