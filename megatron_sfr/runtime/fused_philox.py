"""Philox4x32-10 in one Triton kernel: in plain torch its ten rounds are 120 launches, which cost more than the work."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are Triton's, whose types Python's annotations do not name.

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sfr.runtime.devices import launching_on

BLOCK = 1024


@triton.jit
def _philox(c_0, c_1, c_2, c_3, w_0, w_1, w_2, w_3, n, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    a, b = tl.load(c_0 + i, mask=here).to(tl.uint32), tl.load(c_1 + i, mask=here).to(tl.uint32)
    c, d = tl.load(c_2 + i, mask=here).to(tl.uint32), tl.load(c_3 + i, mask=here).to(tl.uint32)
    x, y, z, w = tl.philox(seed, a, b, c, d)
    tl.store(w_0 + i, x.to(tl.int64), mask=here)
    tl.store(w_1 + i, y.to(tl.int64), mask=here)
    tl.store(w_2 + i, z.to(tl.int64), mask=here)
    tl.store(w_3 + i, w.to(tl.int64), mask=here)


def philox(c: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same values as `noise.philox`, bit for bit."""
    counters = [x.contiguous() for x in torch.broadcast_tensors(*c)]
    words = [torch.empty_like(x) for x in counters]
    if n := words[0].numel():
        with launching_on(words[0]):
            _philox[(triton.cdiv(n, BLOCK),)](*counters, *words, n, seed, BLOCK=BLOCK)
    x, y, z, w = words
    return x, y, z, w
