"""Gradient accumulation fused in Transformer Engine's layers where Megatron's own output layer cannot have it.

The output layer's fused kernel is Apex's, and upstream raises where it is not built (core/tensor_parallel/layers.py in
megatron-core 0.19.2). Transformer Engine's linear layers bring their own. So the model is built from a config without
the fusion, and the fusion is then switched on in each of those layers. Upstream's DDP handles every parameter
separately: it adds `.grad` to `.main_grad` unless the layer's backward has set `grad_added_to_main_grad`.
"""

from torch import nn

# megatron-core 0.19.2 passes config.gradient_accumulation_fusion under this name to every layer of Transformer Engine,
# which keeps it as an attribute and reads it in each forward pass.
SWITCH = "fuse_wgrad_accumulation"


def fuse_layers(model: nn.Module) -> int:
    """Switches the fusion on in each layer of Transformer Engine; returns their number."""
    layers = [module for module in model.modules() if hasattr(module, SWITCH)]
    for layer in layers:
        setattr(layer, SWITCH, True)
    return len(layers)
