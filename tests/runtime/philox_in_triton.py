"""A program: Philox as a Triton kernel, in the interpreter on the CPU, against Philox in torch. Prints the differences.

The interpreter has to be chosen before Triton is imported, so this runs in a separate process.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from megatron_sfr.runtime import fused_philox, noise

if __name__ == "__main__":
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 1, 5), (1, 700, 1), (3, 700, 5), (1,))  # more than one block, not a multiple of it, broadcast
    counters = tuple(torch.randint(0, 2**32, shape, generator=g) for shape in shapes)
    for seed in (0, 1234, 2**40 + 17, 2**63 - 1):
        words, expected = fused_philox.philox(counters, seed), noise.philox(counters, seed)
        print(seed, sum(int((a != b).sum()) for a, b in zip(words, expected, strict=True)))
    print("empty", sum(x.numel() for x in fused_philox.philox((counters[0][:0],) * 4, 1)))
