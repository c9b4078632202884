"""Corrects upstream's fully reshardable optimizer checkpoints where a buffer has several buckets.

megatron-core 0.19.2 gathers optimizer state without the padding between buckets, and then cuts it by offsets that count
the padding. From the first padded bucket on, each parameter is saved with the state of its neighbours (a comment there
mentions "a bug in the param ranges logic"), and a resumed run uses that state.
"""

import functools
from itertools import accumulate
from typing import Any

from megatron_sfr.runtime.replacements import Replacement, wrapper

Offsets = dict[Any, tuple[int, int, int]]  # parameter -> first and last + 1 element in the buffer, and the bucket


def without_padding(offsets: Offsets, starts: list[int], unpadded: list[int]) -> Offsets:
    """Offsets in the buffer after the padding between buckets is removed.

    Args:
        starts: first element of each bucket in the padded buffer.
        unpadded: number of elements of each bucket before its padding.
    """
    moved = [start - before for start, before in zip(starts, accumulate(unpadded, initial=0), strict=False)]
    return {p: (first - moved[bucket], end - moved[bucket], bucket) for p, (first, end, bucket) in offsets.items()}


@wrapper
def _cut_without_padding(original: Any) -> Any:
    @functools.wraps(original)
    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            starts, unpadded = ([getattr(b, name) for b in buffer.buckets] for name in ("offset", "numel_unpadded"))
            buffer.param_index_map = without_padding(buffer.param_index_map, starts, unpadded)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, offsets in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = offsets

    return sharded_state


REPLACEMENTS = (
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        _cut_without_padding,
        "saves each parameter behind a padded bucket with its neighbours' optimizer state",
        ("self",),
    ),
)
