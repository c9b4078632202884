"""Fuses gradient accumulation in Transformer Engine's layers where Megatron's own kernel, from Apex, is missing.

Megatron's output layer needs Apex's kernel, and upstream raises an error without it (core/tensor_parallel/layers.py in
megatron-core 0.19.2). Transformer Engine's linear layers have their own kernel. The model is therefore built without
the fusion, which is then enabled in each of these layers. Upstream's DDP handles every parameter separately: it adds
`.grad` to `.main_grad` unless the layer's backward has set `grad_added_to_main_grad`.
"""

from torch import nn

# megatron-core 0.19.2 passes config.gradient_accumulation_fusion under this name to every layer of Transformer Engine,
# which keeps it as an attribute and reads it in each forward pass.
SWITCH = "fuse_wgrad_accumulation"


def fuse_layers(model: nn.Module) -> int:
    """Enables the fusion in every Transformer Engine layer; returns the number of layers."""
    layers = [module for module in model.modules() if hasattr(module, SWITCH)]
    for layer in layers:
        setattr(layer, SWITCH, True)
    return len(layers)
