"""The numbers in a quantized folder, in plain torch: what a stored weight means, and how an engine rounds its inputs.

Formats: E4M3 is an 8-bit float up to 448, E2M1 a 4-bit float up to 6. Shapes: O outputs, I inputs of a linear layer.
"""

import torch
from torch import Tensor

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
E2M1_MAX = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of E2M1 by the lower three of their four bits; the highest bit is the sign."""
BLOCK = 16
"""Inputs of a weight, or features of an activation, that share a scale in NVFP4."""
_TO_EVEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Values halfway between two of E2M1. They round to the one with an even last bit."""


def fp8_values(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """The numbers [O, I] that a weight in E4M3 with one scale stands for, in fp32."""
    return weight_OI.float() * scale


def nvfp4_values(packed: Tensor, block_scales: Tensor, scale: Tensor) -> Tensor:
    """The numbers [O, I] that a weight in NVFP4 stands for, in fp32.

    Args:
        packed: two numbers in E2M1 in each byte, the first in the lower half [O, I / 2].
        block_scales: in E4M3, one for each 16 inputs [O, I / 16].
        scale: of the block scales, one number.
    """
    bits = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    table = torch.tensor([*E2M1, *(-x for x in E2M1)], device=packed.device)
    blocks = table[bits].unflatten(-1, (-1, BLOCK))
    return (blocks * (block_scales.float() * scale)[..., None]).flatten(-2)


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Activations after rounding to E4M3 with one scale; larger ones saturate."""
    return ((x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() * scale).to(x.dtype)


def round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """Activations [..., I] after rounding to NVFP4: block scales from the values, relative to one stored scale."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    step = (largest / (E2M1_MAX * scale)).clamp(2**-9, E4M3_MAX).to(E4M3).float() * scale
    return (round_e2m1(blocks / step) * step).flatten(-2).to(x.dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest number of E2M1, the one with an even last bit between two; numbers beyond 6 become 6."""
    bounds = torch.tensor(_TO_EVEN, device=x.device)
    bounds[1::2] = torch.nextafter(bounds[1::2], bounds.new_zeros(()))  # these round up: the upper neighbour is even
    return torch.tensor(E2M1, device=x.device)[torch.bucketize(x.abs(), bounds)].copysign(x)
