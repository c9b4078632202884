"""A trained denoiser of KL-flow out of its checkpoint, whatever layout wrote it, in one process: for sampling."""

import argparse
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import gpt_config_from_args

from megatron_sfr.hf.checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.model.kl_flow import KLFlowModelBuilder, KLFlowModelConfig
from megatron_sfr.runtime.backend import CPU_CHANGES, UNFUSED, adapt_config_to_cpu, device

ALONE = {
    "tensor_model_parallel_size": 1,
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
    config.time, config.seed = args.kl_flow_time, args.seed
    return config


def load_denoiser(path: Path, backend: Literal["cpu", "cuda"]) -> tuple[GPTModel, argparse.Namespace]:
    """The model, ready for `model.kl_flow.denoise`, and the arguments of the run that wrote it.

    Starts this process as the only rank where it belongs to no group yet; `runtime.backend.start` comes before. The
    vocabulary is args.vocab_size, the model's columns args.padded_vocab_size, b of the simplex args.kl_flow_smoothing.
    Args: path: a --save folder, or one checkpoint in it. ValueError where it is no checkpoint of KL-flow.
    """
    folder = find_checkpoint(path)
    stored = dict(Checkpoint(folder).arguments())
    if stored.get("training_task") != "kl-flow":
        raise ValueError(f"{folder} holds no KL-flow model: train one with --training-task kl-flow")
    changes = {change.dest: change.value for change in CPU_CHANGES} if backend == "cpu" else {}
    args = argparse.Namespace(**stored | ALONE | changes)
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo" if backend == "cpu" else "nccl", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(args.seed)
    config = denoiser_config(args)
    if backend == "cpu":
        adapt_config_to_cpu(config.transformer)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = KLFlowModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    metadata = dict(dist_checkpointing.load_content_metadata(str(folder)) or {})
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(folder)))
    return model.to(device()).eval(), args
