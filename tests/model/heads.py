"""Small flow heads and their inputs, for the tests of the model."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan

B, A, K, D, H, W = 2, 3, 2, 5, 8, 6


def make_head(
    kind: str = "mlp",
    *,
    depth: int = 2,
    ema: str = "none",
    order: str = "after_step",
    decay: float = 0.75,
    precondition: bool = False,
    **plan: object,
) -> FlowHead:
    """A new head; plan: fields of FlowHeadPlan."""
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, cuda_graph_modules=[])
    averages = {"ema": ema, "ema_order": order, "ema_decay": decay}
    options = FlowHeadOptions(
        architecture=kind, width=W, depth=depth, precondition=precondition, time_scale=10.0, **averages
    )
    return FlowHead(config, FlowHeadPlan(options, dim=D, **plan))


def randomized(module: nn.Module, seed: int = 5) -> nn.Module:
    """Makes every parameter random, so that none keeps an initial value of zero or one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return module


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, h and horizons 0 to 2."""
    g = torch.Generator().manual_seed(0)
    shapes = ((B, A, K, D), (B, A, K, 1), (B, A, 1, H))
    x_t, t, h = (torch.rand(shape, generator=g, dtype=dtype) for shape in shapes)
    return x_t, t, h, torch.arange(A).expand(B, A)
