"""FP8 and NVFP4 in plain torch: stored numbers, and rounding to the nearest number of the format."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.hf.quantized.number_formats import (
    BLOCK,
    E2M1,
    E4M3,
    fp8_values,
    nvfp4_values,
    round_e2m1,
    round_fp8,
    round_nvfp4,
)


def test_stored_numbers() -> None:
    """By hand: two numbers in a byte, the first in the lower half; the highest of four bits is the sign."""
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    found = nvfp4_values(packed, torch.tensor([[0.5]]).to(E4M3), torch.tensor(4.0))
    assert found.tolist() == [[2 * x for x in (*E2M1, *(-x for x in E2M1))]]
    assert fp8_values(torch.tensor([[1.125, -448.0]]).to(E4M3), torch.tensor(2.0)).tolist() == [[2.25, -896.0]]


@given(st.floats(-8, 8, width=32))
def test_e2m1_is_the_nearest_number(x: float) -> None:
    found = abs(round_e2m1(torch.tensor([x])).item())
    nearest = min(abs(abs(x) - value) for value in E2M1)
    assert found in E2M1
    assert abs(abs(x) - found) == nearest


def test_ties_of_e2m1_have_an_even_last_bit() -> None:
    halfway = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
    for x in (halfway, -halfway):
        assert all(E2M1.index(value) % 2 == 0 for value in round_e2m1(x).abs().tolist())
        assert torch.equal(round_e2m1(x).sign() * x.sign() >= 0, torch.ones(len(x), dtype=torch.bool))


def test_rounded_activations() -> None:
    x = torch.randn(3, 4 * BLOCK, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 4 * BLOCK)
    scale = x.abs().max() / 448
    assert ((round_fp8(x, scale) - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert torch.equal(round_fp8(x * 8, scale).abs().amax(), scale * 448)  # larger ones saturate
    blocks = x.unflatten(-1, (-1, BLOCK))
    error = (round_nvfp4(x, scale / 6).unflatten(-1, (-1, BLOCK)) - blocks).abs()
    assert (error <= blocks.abs().amax(dim=-1, keepdim=True) / 5).all()  # half of the largest step, 2, of 6 and slack
    assert error.max() > 0
    assert round_nvfp4(torch.zeros(1, BLOCK, dtype=torch.bfloat16), scale).dtype == torch.bfloat16
