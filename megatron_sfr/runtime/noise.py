"""Stateless random numbers: each is a function of its key and counter, independent of layout, order and resume.

Philox4x32-10 (Salmon et al., SC 2011), the generator of cuRAND and Triton, in integer tensor arithmetic.
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
PIECE = 1 << 17  # numbers that `uniforms` draws at a time: their counters fit a cache of a CPU
PIECE_ON_GPU = 1 << 23  # 140 MB of counters and words: with small pieces a GPU would wait for launches


def philox(c: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        c: four int64 tensors of one (broadcastable) shape; the low 32 bits of each are the counter.
        seed: 64-bit key.

    Returns:
        Four int64 tensors in [0, 2^32).
    """
    if c[0].is_cuda:
        from megatron_sfr.runtime import fused_philox  # needs Triton, which not every platform has

        return fused_philox.philox(c, seed)
    c_0, c_1, c_2, c_3 = (x & MASK for x in c)
    k_0, k_1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        a, b = c_0 * ROUND_A, c_2 * ROUND_B  # modulo 2^64: signed overflow wraps, the bits are those of uint64
        c_0, c_1, c_2, c_3 = ((b >> 32) & MASK) ^ c_1 ^ k_0, b & MASK, ((a >> 32) & MASK) ^ c_3 ^ k_1, a & MASK
        k_0, k_1 = (k_0 + KEY_A) & MASK, (k_1 + KEY_B) & MASK
    return c_0, c_1, c_2, c_3


def to_unit(word: Tensor) -> Tensor:
    """Random words to float32 in the open interval (0, 1): (floor(w / 2^9) + 1/2) / 2^23, exact in float32."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def _counter(sample: Tensor, position: Tensor, draw: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    high = (sample >> 32) & 0xFFFF  # samples beyond 2^32 borrow the bits above stream and draw
    return position, sample & MASK, (draw & 0xFFF) | (stream << 12) | (high << 16)


def uniform(seed: int, sample: Tensor, position: Tensor, draw: Tensor, *, stream: int) -> Tensor:
    """One float32 in (0, 1) for each (sample, position, draw); int64 tensors of broadcastable shapes.

    stream (0 to 15) separates uses of one key: different streams are independent.
    """
    position, sample, rest = torch.broadcast_tensors(*_counter(sample, position, draw, stream))
    return to_unit(philox((torch.zeros_like(sample), position, sample, rest), seed)[0])


def normal(seed: int, sample: Tensor, position: Tensor, draw: Tensor, dim: int, *, stream: int) -> Tensor:
    """dim independent float32 N(0, 1) numbers for each (sample, position, draw): [..., dim].

    Box-Muller on the four words of a block, so dimension i of a vector does not depend on dim.
    """
    position, sample, rest = torch.broadcast_tensors(*_counter(sample, position, draw, stream))
    block = torch.arange(math.ceil(dim / 4), device=sample.device)
    w = philox((block, position[..., None], sample[..., None], rest[..., None]), seed)
    u = [to_unit(x) for x in w]
    radius = [(-2 * x.log()).sqrt() for x in (u[0], u[2])]
    angle = [2 * math.pi * x for x in (u[1], u[3])]
    z = torch.stack([f(a) * r for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)], dim=-1)
    return z.flatten(-2)[..., :dim]


def uniforms(
    seed: int, sample: Tensor, position: Tensor, draw: Tensor, width: int, *, start: int = 0, stream: int
) -> Tensor:
    """width independent float32 numbers in (0, 1) for each (sample, position, draw): [..., width].

    Column i is number start + i of a longer vector (start a multiple of 4), so the shards of an axis fit together.
    """
    if start % 4:
        raise ValueError(f"start = {start}: blocks hold 4 numbers, so a shard starts at a multiple of 4")
    position, sample, rest = torch.broadcast_tensors(*_counter(sample, position, draw, stream))
    drawn = torch.empty(*sample.shape, width, device=sample.device)
    numbers = PIECE_ON_GPU if drawn.is_cuda else PIECE
    piece = max(4, numbers // max(1, sample.numel()) // 4 * 4)
    for at in range(0, width, piece):
        end = min(at + piece, width)
        block = torch.arange((start + at) // 4, math.ceil((start + end) / 4), device=sample.device)
        w = philox((block, position[..., None], sample[..., None], rest[..., None]), seed)
        drawn[..., at:end] = torch.stack([to_unit(x) for x in w], dim=-1).flatten(-2)[..., : end - at]
    return drawn
