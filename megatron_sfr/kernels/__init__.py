"""The two passes over the logits that every token objective makes: in plain torch, and fused in Triton for CUDA."""

import importlib
from types import ModuleType

from torch import Tensor


def choose(x: Tensor) -> ModuleType:
    """The module whose row_statistics and write_gradient suit a tensor's device; both modules give the same numbers."""
    return importlib.import_module(f"megatron_sfr.kernels.{'fused' if x.is_cuda else 'plain'}")
