"""Programs that answer, without a GPU, what a run with CUDA would meet; each prints one line of JSON.

`flags ARGV`: CUDA is reported present, upstream validates the flags and builds the model, which takes a step of bf16 on
a CPU that answers for the GPU. `fusion`: upstream's DDP over a layer that adds to `main_grad` itself, as Transformer
Engine's do, beside upstream's own output layer. `adam`: the modules of what repairs torch's Adam. What this does not
exercise: any CUDA kernel.
"""

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sfr.runtime import backend, cpu


def flags(argv: list[str]) -> dict[str, Any]:
    """What the backend changes in these flags, and the loss of a step of the model that they build."""
    torch.cuda.is_available = lambda: True
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_sfr.config.build import model_config
    from megatron_sfr.config.run_plan import plan_run
    from megatron_sfr.config.settings import parse, read_settings

    settings = read_settings(argv)
    args = parse(settings)
    config = model_config(plan_run(args, settings.backend))
    training.initialize_megatron(allow_no_cuda=True)
    config.transformer.deallocate_pipeline_outputs = False
    builder = type(config).builder.rpartition(".")
    build = getattr(sys.modules[builder[0]], builder[2])(config).build_model
    model = build(ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True).bfloat16()
    tokens_BS = torch.arange(2 * args.seq_length).view(2, -1) % args.vocab_size
    loss = model(tokens_BS, torch.arange(args.seq_length).repeat(2, 1), None, labels=tokens_BS).mean()
    loss.backward()
    return {"backend": settings.backend, "changes": settings.changes, "loss": loss.item()}


class Accumulating(torch.autograd.Function):
    """x W^T whose backward adds the weight's gradient to W.main_grad and returns a dummy, as Transformer Engine's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.flatten(0, -2).t() @ x.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)


class Layer(nn.Module):
    """A linear layer with the switch of Transformer Engine's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.fuse_wgrad_accumulation = False

    def forward(self, x: Tensor) -> Tensor:
        return Accumulating.apply(x, self.weight) if self.fuse_wgrad_accumulation else x @ self.weight.t()


class Model(nn.Module):
    """A layer, and upstream's output layer without the fusion."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear

        self.layer = Layer(config.hidden_size)
        self.output = ColumnParallelLinear(
            config.hidden_size, 12, config=config, init_method=nn.init.normal_, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x))[0]


def fusion() -> dict[str, Any]:
    """The largest difference that the switch makes in the main gradients of two microbatches."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_sfr.model.gradient_fusion import fuse_layers

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    config = TransformerConfig(**sizes, gradient_accumulation_fusion=False, use_cpu_initialization=True)
    plain, fused = Model(config), Model(config)
    for target, source in zip(fused.parameters(), plain.parameters(), strict=True):
        target.data.copy_(source.data)
    switched = fuse_layers(fused)
    data = torch.randn(2, 5, 1, 8)
    gradients = []
    for model in (plain, fused):
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
        wrapped = DistributedDataParallel(config, options, model)
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            wrapped(data[0]).square().sum().backward()
        wrapped(data[1]).square().sum().backward()
        wrapped.finish_grad_sync()
        gradients.append([p.main_grad.clone() for p in model.parameters()])
    differences = [(a - b).abs().max().item() for a, b in zip(*gradients, strict=True)]
    return {"switched": switched, "norms": [g.norm().item() for g in gradients[0]], "differences": differences}


def adam() -> list[str]:
    """The modules that upstream's names of TORCH_ADAM are from, once a run with CUDA has started."""
    backend.start("cuda")
    return [entry.original().__module__ for entry in cpu.TORCH_ADAM]


def on_one_rank(argv: list[str]) -> dict[str, Any]:
    """`flags` or `fusion` as the only rank of a run."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return fusion() if argv[0] == "fusion" else flags(argv[1:])


if __name__ == "__main__":
    print(json.dumps(adam() if sys.argv[1] == "adam" else on_one_rank(sys.argv[1:])))
