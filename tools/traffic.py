"""Counts what each torch operation reads and writes, what is alive at most, and what goes over process groups.

A count of operands, not a measurement: an operation is taken to read each input and write each output once.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLUMN_READS = {"gather", "index", "index_select", "embedding", "nll_loss_forward", "nll_loss2d_forward"}
COLUMN_WRITES = {"scatter_", "scatter_add_", "index_put_", "_index_put_impl_"}
ONLY_WRITTEN = {"copy_", "fill_", "zero_"}


class Traffic(TorchDispatchMode):
    """Bytes moved, the peak of live bytes beyond what was there before, and collectives, while it is entered.

    An operand counts as `memory` if its storage has at least half the size of the logits' storage, or is a view of such
    a one; else as `cache`: blocks that are written and read again at once, and what there is of each row.
    Views move nothing; a gather or scatter of columns moves only what it touches; empty tensors are not written.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.large = logits.untyped_storage().nbytes() / 2
        self.memory = self.cache = 0
        self.live = self.peak = 0
        self.collectives = self.sent = 0
        self.known: set[int] = {logits.untyped_storage()._cdata}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            self._collective(args)
            return out
        name, returns = func._schema.name.split("::")[1], func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out  # a view
        for x in outputs:
            if x.untyped_storage()._cdata not in before:
                self._born(x)
        if name.startswith("new_") or name.endswith("_like"):
            args = ()  # of the first tensor only the kind is read
        if "empty" not in name:
            self._operands(func, name, args, kwargs, outputs)
        return out

    def _operands(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        given = list(args) + [None] * len(func._schema.arguments)
        written = []
        touched = sum(x.numel() for x in outputs) if name in COLUMN_READS else None
        for place, argument in enumerate(func._schema.arguments):
            for x in tree_leaves(kwargs.get(argument.name, given[place])):
                if not isinstance(x, Tensor):
                    continue
                if argument.alias_info is None or not argument.alias_info.is_write:
                    self._move(x, touched if place == 0 else None)
                    continue
                written.append(x.data_ptr())
                if name in COLUMN_WRITES:  # read and written where the index, or the values put there, say
                    self._move(x, 2 * args[2].numel())
                elif name == "index_fill_":  # (x, dim, index, value)
                    self._move(x, args[2].numel() * x.numel() // x.shape[args[1]])
                else:
                    self._move(x)
                    if name.endswith("_") and name not in ONLY_WRITTEN:
                        self._move(x)
        for x in outputs:
            if x.data_ptr() not in written:
                self._move(x)

    def _move(self, x: Tensor, elements: int | None = None) -> None:
        count = (_elements(x) if elements is None else elements) * x.element_size()
        if x.untyped_storage().nbytes() >= self.large:
            self.memory += count
        else:
            self.cache += count

    def _born(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._dead, key, size)

    def _dead(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def _collective(self, args: Any) -> None:
        self.collectives += 1
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        self.sent += tensors[-1].numel()  # (outputs, inputs, ...) or (tensors, ...)


def _elements(x: Any) -> int:
    """Numbers that lie in memory: an expanded dimension holds one."""
    if not isinstance(x, Tensor):
        return 1
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count
