"""SFR in your own loop around Megatron Core: your model, batches, optimizer and schedule. One file to copy from.

torchrun --nproc-per-node 2 examples/own_loop/train.py --tp 2        # or --pp 2

The batches are random: replace `batches`. Shapes: B samples, S positions, P anchors, D dimension of the embeddings.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

import megatron_sfr as sfr

VOCAB, PADDED, S, B, D, MICROBATCHES = 61, 64, 24, 2, 6, 2
OPTIONS = sfr.TermOptions(head=sfr.FlowHeadOptions(width=16))
SCHEDULE = sfr.ScheduleOptions(warmup="detached", warmup_steps=1, ramp_steps=2)


def batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
    """The microbatches of a step."""
    for microbatch in range(step * MICROBATCHES, (step + 1) * MICROBATCHES):
        with torch.device("cpu"):  # the forward step copies what it needs
            batch = make_batch(microbatch)
        yield batch


def make_batch(microbatch: int) -> dict[str, torch.Tensor]:
    """Prompts of 4 tokens, replies of 20, and two anchors in each reply."""
    ordinal = np.array([0, 8])  # the tokens of the reply before which an anchor's future starts
    weight = sfr.anchor_weights(ordinal, np.full(2, 20), np.zeros(2, np.int64))
    g = torch.Generator().manual_seed(microbatch)
    tokens = torch.randint(VOCAB, (B, S + 1), generator=g)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(S).expand(B, S),
        "loss_mask": (torch.arange(S) >= 4).float().expand(B, S),
        "anchor_position": torch.from_numpy(4 + ordinal).expand(B, 2),
        "anchor_sample": (microbatch * B + torch.arange(B))[:, None].expand(B, 2),
        "anchor_weight": torch.from_numpy(weight).expand(B, 2),
        "target": torch.nn.functional.normalize(torch.randn(B, 2, D, generator=g), dim=-1),
    }


def make_model(tp: int, pp: int) -> DistributedDataParallel:
    """This rank's part of a GPTModel with a flow head, in DDP."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,  # the loss is a sum, which the tokens of the global batch divide
        finalize_model_grads_func=finalize_model_grads,
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    layer = get_gpt_layer_local_spec()
    model = GPTModel(config, layer, PADDED, S, first, last, position_embedding_type="rope")
    [model] = sfr.attach_head(sfr.flow_head_plan(D, OPTIONS, SCHEDULE))([model])
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.to(torch.get_default_device()))


def train(model: DistributedDataParallel, steps: int) -> list[dict[str, float]]:
    """Trains, and returns what each step logs: on the last pipeline stage; elsewhere it is empty."""
    config = OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3, clip_grad=1.0)
    optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
    scheduler = OptimizerParamScheduler(optimizer, 0.0, 1e-2, 1e-3, 1, steps, "cosine", 0.01, 0.01, steps, "constant")
    forward_step, run = sfr.forward_step(VOCAB, sfr=OPTIONS, schedule=SCHEDULE), get_forward_backward_func()
    logged = []
    for i in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = run(
            forward_step_func=partial(forward_step, sfr.StepContext(i, steps, MICROBATCHES, implementation="local")),
            data_iterator=batches(i),
            model=[model],
            num_microbatches=MICROBATCHES,
            seq_length=S,
            micro_batch_size=B,
            forward_only=False,
        )
        with sfr.separate_clipping():  # the head has its own gradient norm
            optimizer.step()
        scheduler.step(1)
        sums = {name: sum(x[name] for x in found) for name in (found[0] if found else ())}  # [sum, count] each
        logged.append({name: float(total / count) for name, (total, count) in sums.items()})
    return logged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_default_device("cuda")
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(args.tp, args.pp)
    model_parallel_cuda_manual_seed(1)
    for number, line in enumerate(train(make_model(args.tp, args.pp), steps=5)):
        print(number, line)
