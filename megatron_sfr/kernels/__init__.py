"""The two passes over the logits that every token loss makes, in plain torch and fused in Triton for CUDA; and the
vocabulary axis that they share."""

import importlib
from types import ModuleType

from torch import Tensor

__all__ = ["choose"]


def choose(x: Tensor) -> ModuleType:
    """The module to use on a tensor's device: `fused` on CUDA, else `plain`. Both compute the same numbers."""
    return importlib.import_module(f"megatron_sfr.kernels.{'fused' if x.is_cuda else 'plain'}")
