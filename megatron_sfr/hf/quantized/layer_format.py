"""The formats of `convert quantize`: their names in Model Optimizer, and the tensors of a layer for engines.

The layout is that of Model Optimizer's unified Hugging Face export, which vLLM, SGLang and TensorRT-LLM read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sfr.hf.quantized.number_formats import (
    BLOCK,
    E4M3,
    fp8_values,
    nvfp4_values,
    round_fp8,
    round_nvfp4,
)

Name = Literal["fp8", "int8", "nvfp4"]
WEIGHT, WEIGHT_SCALE, WEIGHT_SCALE_2, INPUT_SCALE = "weight", "weight_scale", "weight_scale_2", "input_scale"


@dataclass(frozen=True)
class Format:
    """A format of weights and activations."""

    configuration: str
    """Model Optimizer's configuration, an attribute of modelopt.torch.quantization."""
    algorithm: str | None = None
    """quant_algo in the folder for engines; None: engines have no folder of this format."""
    block: int = 1
    """Inputs of a layer that share a scale. The layer's width has to be a multiple of it."""
    tolerance: float = 0.0
    """Largest relative rms error of a weight in a correct folder."""

    def layout(self, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors of a linear layer in the folder for engines."""
        if self.algorithm == "NVFP4":
            return {
                WEIGHT: (torch.uint8, (outputs, inputs // 2)),
                WEIGHT_SCALE: (E4M3, (outputs, inputs // BLOCK)),
                WEIGHT_SCALE_2: (torch.float32, ()),
                INPUT_SCALE: (torch.float32, ()),
            }
        return {
            WEIGHT: (E4M3, (outputs, inputs)),
            WEIGHT_SCALE: (torch.float32, ()),
            INPUT_SCALE: (torch.float32, ()),
        }

    def values(self, layer: Mapping[str, Tensor]) -> Tensor:
        """The numbers [outputs, inputs] that the weight of a layer stands for, in fp32."""
        if self.algorithm == "NVFP4":
            return nvfp4_values(layer[WEIGHT], layer[WEIGHT_SCALE], layer[WEIGHT_SCALE_2])
        return fp8_values(layer[WEIGHT], layer[WEIGHT_SCALE])

    def rounded_input(self, x: Tensor, layer: Mapping[str, Tensor]) -> Tensor:
        """The input of a layer as an engine rounds it."""
        rounded = round_nvfp4 if self.algorithm == "NVFP4" else round_fp8
        return rounded(x, layer[INPUT_SCALE].to(x.device))


FORMATS: dict[Name, Format] = {
    "fp8": Format("FP8_DEFAULT_CFG", "FP8", tolerance=0.05),
    "nvfp4": Format("NVFP4_DEFAULT_CFG", "NVFP4", block=BLOCK, tolerance=0.2),
    "int8": Format("INT8_SMOOTHQUANT_CFG"),
}
"""E4M3 per tensor; E2M1 with a scale for each 16 inputs; INT8 weights per channel, with smoothed activations."""
