"""Parameter mappings: a tensor's name in Megatron's checkpoint, its names in Hugging Face's, and the invertible map.

A model family is a table of mappings, in one file, so import, export and checks are the same code for all families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megatron_sfr.hf.config_values import Config

if TYPE_CHECKING:
    from torch import Tensor

LAYER, EXPERT = "{layer}", "{expert}"
Spans = tuple[tuple[int, int], ...]
"""Starts and stops along one axis."""
Divided = tuple[tuple[str, str], ...]
"""Ends of names, and sizes along the first axis."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model, from its HF config; mappings refer to them by name."""

    layers: int
    vocab: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    one: int = 1

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.groups * self.head_dim

    @property
    def gated_ffn(self) -> int:
        """Gate and up projection in one tensor."""
        return 2 * self.ffn

    def shape(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """("vocab", "hidden") -> (151936, 4096)."""
        return tuple(getattr(self, name) for name in names)


class ParameterMapping(Protocol):
    """Protocol of a parameter mapping; `{layer}` and `{expert}` in its names are indices."""

    @property
    def megatron(self) -> str:
        """Megatron's name. A checkpoint stacks layers and experts under this name, without their indices."""

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face's names of the parts."""

    @property
    def tp_dim(self) -> int | None:
        """The axis along which tensor parallelism splits Megatron's tensor; None if it is replicated."""

    @property
    def padded(self) -> bool:
        """Whether Megatron may pad the vocabulary axis so that its ranks divide it."""

    @property
    def divided(self) -> Divided:
        """The tensors that a checkpoint keeps of Megatron's, in their order; empty if it is a single one."""

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts, in the order of `names`."""

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        """Shape of Megatron's tensor, without padding."""

    def grain(self, d: Dimensions) -> int:
        """Megatron's tensor is split along `tp_dim` (None: the first axis) at multiples of this."""

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[Spans, ...]:
        """For each part, the spans along the same axis that, concatenated, are what `join` makes start..stop from."""

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        """Hugging Face's parts, or the `spans` of them -> Megatron's tensor, or that span of it."""

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        """Megatron's tensor -> Hugging Face's parts: the inverse of `join`, bit for bit. Only reorders rows."""


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    megatron: str
    names: tuple[str]
    size: tuple[str, ...]
    tp_dim: int | None = None
    padded: bool = False
    divided: Divided = ()

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        return (d.shape(self.size),)

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        return d.shape(self.size)

    def grain(self, d: Dimensions) -> int:
        return 1

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[Spans, ...]:
        return (((start, stop),),)

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        (tensor,) = parts
        return tensor

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections, which Megatron keeps in one tensor, group by group: q...q k v, q...q k v, ...

    A group is one key-value head with the query heads that share it. Tensor parallelism splits between groups.
    """

    megatron: str
    names: tuple[str, str, str]
    columns: tuple[str, ...]
    """("hidden",) for a weight, () for a bias."""
    tp_dim: int | None = 0
    padded: bool = False
    divided: Divided = ()

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        return tuple(d.shape((rows, *self.columns)) for rows in ("query", "key_value", "key_value"))

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        return (d.query + 2 * d.key_value, *d.shape(self.columns))

    def grain(self, d: Dimensions) -> int:
        return sum(self.group(d))

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[Spans, ...]:
        first, last = start // self.grain(d), stop // self.grain(d)
        return tuple(((first * rows, last * rows),) for rows in self.group(d))

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        import torch  # here: a config.json is checked without it

        columns = parts[0].shape[1:]  # those of a weight, none of a bias, the rank of an adapter
        groups = [x.reshape(-1, rows, *columns) for x, rows in zip(parts, self.group(d), strict=True)]
        return torch.cat(groups, dim=1).reshape(-1, *columns)

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        columns = tensor.shape[1:]
        parts = tensor.reshape(d.groups, -1, *columns).split(self.group(d), dim=1)
        return tuple(x.reshape(-1, *columns) for x in parts)

    def group(self, d: Dimensions) -> list[int]:
        """Rows of q, k and v in a group."""
        return [d.query // d.groups, d.head_dim, d.head_dim]


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections, which Megatron stacks: its checkpoint holds all of gate, then all of up."""

    megatron: str
    names: tuple[str, str]
    size: str = "ffn"
    tp_dim: int | None = 0
    padded: bool = False
    divided: Divided = ()

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        (rows,) = d.shape((self.size,))
        return ((rows, d.hidden), (rows, d.hidden))

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        (rows,) = d.shape((self.size,))
        return (2 * rows, d.hidden)

    def grain(self, d: Dimensions) -> int:
        return 1

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[Spans, ...]:
        (rows,) = d.shape((self.size,))
        return ((min(start, rows), min(stop, rows)),), ((max(start, rows) - rows, max(stop, rows) - rows),)

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        import torch  # here: a config.json is checked without it

        return torch.cat(parts)

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        return tensor.split(d.shape((self.size,))[0])


@dataclass(frozen=True)
class Family:
    """A model family. Each callable reads an HF config and raises ValueError for what Megatron computes differently."""

    dimensions: Callable[[Config], Dimensions]
    mappings: Callable[[Config], tuple[ParameterMapping, ...]]
    flags: Callable[[Config], dict[str, object]]
    """Megatron's flags for the shape of the model, as keys of a recipe."""
    extra_states: Callable[[Config], tuple[str, ...]]
    """Modules for which Megatron, with either spec, expects an extra state in a checkpoint (empty except under fp8)."""
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    """A copy that some folders of tied models contain, and the tensor that it must equal."""


class Section(NamedTuple):
    """A tensor of a checkpoint that holds a part of Megatron's tensor, or all of it."""

    end: str
    """What its key has after the mapping's name."""
    start: int
    """Its first index along the first axis of Megatron's tensor."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A mapping at one layer (None: outside the layers) and, in layers with experts, at one expert."""

    mapping: ParameterMapping
    layer: int | None
    expert: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(x.replace(LAYER, str(self.layer)).replace(EXPERT, str(self.expert)) for x in self.mapping.names)

    @property
    def stacked(self) -> str:
        """Key of a checkpoint that stacks the layers along a first axis."""
        return self.mapping.megatron.replace(f"{LAYER}.", "")

    @property
    def single(self) -> str:
        """Key of a checkpoint that keeps each layer separately, as Megatron does if layers differ."""
        return self.mapping.megatron.replace(LAYER, str(self.layer))

    @property
    def index(self) -> tuple[int, ...]:
        """Position of the entry along the leading axes of `stacked`: layer, expert."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def counts(self, d: Dimensions) -> tuple[int, ...]:
        """Sizes of these leading axes."""
        return tuple(n for i, n in ((self.layer, d.layers), (self.expert, d.experts)) if i is not None)

    def sections(self, d: Dimensions) -> tuple[Section, ...]:
        """The tensors that a checkpoint keeps of the entry."""
        size = self.mapping.megatron_shape(d)
        if not self.mapping.divided:
            return (Section("", 0, size),)
        ends, names = zip(*self.mapping.divided, strict=True)
        lengths = d.shape(names)
        starts = accumulate(lengths, initial=0)
        return tuple(Section(end, start, (n, *size[1:])) for end, start, n in zip(ends, starts, lengths, strict=False))


def entries(mappings: tuple[ParameterMapping, ...], d: Dimensions) -> list[Entry]:
    """Every mapping at every layer and expert, in the order of the model: before, in and after the layers.

    The mappings with `{layer}` in their names, which are consecutive, apply to all layers. A family whose layers differ
    has none of these and lists the mappings of each layer, with its number.
    """
    repeated = [LAYER in mapping.megatron for mapping in mappings]
    first = repeated.index(True) if any(repeated) else len(mappings)
    last = first + sum(repeated)
    assert all(repeated[first:last]), "a family lists the mappings of its layers consecutively"
    return [
        *_at(mappings[:first], None, d),
        *(entry for layer in range(d.layers) for entry in _at(mappings[first:last], layer, d)),
        *_at(mappings[last:], None, d),
    ]


def _at(mappings: tuple[ParameterMapping, ...], layer: int | None, d: Dimensions) -> list[Entry]:
    return [
        Entry(mapping, layer, expert)
        for mapping in mappings
        for expert in (range(d.experts) if EXPERT in mapping.names[0] else (None,))
    ]
