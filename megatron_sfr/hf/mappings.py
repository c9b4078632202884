"""A weight is a row: its name in Megatron's checkpoint, its names in Hugging Face's, and the invertible map between.

A family of models is a table of rows (one file a family), so that import, export and checks are the same code for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sfr.storage.user_files import shown

LARGEST = 100_000_000  # of any size or number in config.json
LAYER, EXPERT = "{layer}", "{expert}"
Config = dict[str, Any]
"""An HF config.json as read."""


def need(config: Config, key: str) -> Any:
    """A value of config.json that has no default."""
    if config.get(key) is None:
        raise ValueError(f"config.json has no {key!r}: is it the config of the whole model?")
    return config[key]


def size(config: Config, key: str, default: int | None = None) -> int:
    """A size of config.json: a whole number, at least 1. It may be missing or null where there is a default."""
    value = config.get(key) if default is not None else need(config, key)
    if value is None:
        assert default is not None
        return default
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a whole number from 1 to {LARGEST:,}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """A number of config.json, at least 0, that has a default."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be a number, at least 0")
    return value


def is_true(config: Config, key: str) -> bool:
    """A truth value of config.json; false where it is missing or null."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be true or false")
    return bool(value)


def mapping(config: Config, key: str) -> Config:
    """An object inside config.json; empty where it is missing or null."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: {key} is {shown(value)}; it has to be an object")
    return value or {}


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model, from its HF config; rows name them."""

    layers: int
    vocab: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    experts: int = 0
    expert_ffn: int = 0

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.groups * self.head_dim

    def shape(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """("vocab", "hidden") -> (151936, 4096)."""
        return tuple(getattr(self, name) for name in names)


class Row(Protocol):
    """What every kind of row offers; `{layer}` and `{expert}` in its names are indices."""

    @property
    def megatron(self) -> str:
        """Megatron's name; a checkpoint stacks layers and experts under it, without their indices."""

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face's names of the parts."""

    @property
    def tp_dim(self) -> int | None:
        """The axis of Megatron's tensor that tensor parallelism cuts; None: every rank has all of it."""

    @property
    def padded(self) -> bool:
        """Whether Megatron may have more rows than the vocabulary, to divide them over its ranks."""

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts, in the order of `names`."""

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        """Shape of the whole in Megatron, without padding."""

    def grain(self, d: Dimensions) -> int:
        """Megatron's tensor is cut along `tp_dim` (None: the first axis) at multiples of this."""

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[tuple[int, int], ...]:
        """Start and stop in each part, along the same axis, of what `join` makes start..stop of the whole from."""

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        """Hugging Face's parts, or such spans of them -> Megatron's tensor, or that span of it."""

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        """Megatron's tensor -> Hugging Face's parts: the inverse of `join`, bit for bit."""


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    megatron: str
    names: tuple[str]
    size: tuple[str, ...]
    tp_dim: int | None = None
    padded: bool = False

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        return (d.shape(self.size),)

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        return d.shape(self.size)

    def grain(self, d: Dimensions) -> int:
        return 1

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[tuple[int, int], ...]:
        return ((start, stop),)

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        (tensor,) = parts
        return tensor

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections, which Megatron keeps in one tensor, group by group: q...q k v, q...q k v, ...

    A group is one key-value head with the query heads that share it, so tensor parallelism cuts between groups.
    """

    megatron: str
    names: tuple[str, str, str]
    columns: tuple[str, ...]
    """("hidden",) for a weight, () for a bias."""
    tp_dim: int | None = 0
    padded: bool = False

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        return tuple(d.shape((rows, *self.columns)) for rows in ("query", "key_value", "key_value"))

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        return (d.query + 2 * d.key_value, *d.shape(self.columns))

    def grain(self, d: Dimensions) -> int:
        return sum(self._group(d))

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[tuple[int, int], ...]:
        first, last = start // self.grain(d), stop // self.grain(d)
        return tuple((first * rows, last * rows) for rows in self._group(d))

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        columns = d.shape(self.columns)
        groups = [x.reshape(-1, rows, *columns) for x, rows in zip(parts, self._group(d), strict=True)]
        return torch.cat(groups, dim=1).reshape(-1, *columns)

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        columns = d.shape(self.columns)
        parts = tensor.reshape(d.groups, -1, *columns).split(self._group(d), dim=1)
        return tuple(x.reshape(-1, *columns) for x in parts)

    def _group(self, d: Dimensions) -> list[int]:
        """Rows of q, k and v in a group."""
        return [d.query // d.groups, d.head_dim, d.head_dim]


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections, which Megatron stacks; its checkpoint holds the whole gate, then the whole up."""

    megatron: str
    names: tuple[str, str]
    size: str = "ffn"
    tp_dim: int | None = 0
    padded: bool = False

    def shapes(self, d: Dimensions) -> tuple[tuple[int, ...], ...]:
        (rows,) = d.shape((self.size,))
        return ((rows, d.hidden), (rows, d.hidden))

    def megatron_shape(self, d: Dimensions) -> tuple[int, ...]:
        (rows,) = d.shape((self.size,))
        return (2 * rows, d.hidden)

    def grain(self, d: Dimensions) -> int:
        return 1

    def spans(self, start: int, stop: int, d: Dimensions) -> tuple[tuple[int, int], ...]:
        (rows,) = d.shape((self.size,))
        return (min(start, rows), min(stop, rows)), (max(start, rows) - rows, max(stop, rows) - rows)

    def join(self, parts: tuple[Tensor, ...], d: Dimensions) -> Tensor:
        return torch.cat(parts)

    def split(self, tensor: Tensor, d: Dimensions) -> tuple[Tensor, ...]:
        return tensor.split(d.shape((self.size,))[0])


@dataclass(frozen=True)
class Family:
    """A family of models; each callable reads an HF config and raises ValueError for what Megatron cannot do alike."""

    dimensions: Callable[[Config], Dimensions]
    rows: Callable[[Config], tuple[Row, ...]]
    flags: Callable[[Config], dict[str, object]]
    """Megatron's flags for the shape of the model, as keys of a recipe."""
    extra_states: tuple[str, ...]
    """Modules for which Megatron asks a checkpoint for an extra state (empty but under fp8), local or TE specs."""
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    """A copy that some folders of tied models carry, and the tensor that it must equal."""


@dataclass(frozen=True)
class Entry:
    """A row at one layer (None: outside the layers), and at one expert where the layer has them."""

    row: Row
    layer: int | None
    expert: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.replace(LAYER, str(self.layer)).replace(EXPERT, str(self.expert)) for name in self.row.names)

    @property
    def stacked(self) -> str:
        """Key of a checkpoint that stacks the layers along a first axis."""
        return self.row.megatron.replace(f"{LAYER}.", "")

    @property
    def single(self) -> str:
        """Key of a checkpoint that keeps each layer apart, as Megatron does where layers differ."""
        return self.row.megatron.replace(LAYER, str(self.layer))

    @property
    def index(self) -> tuple[int, ...]:
        """Where the entry is along the axes that `stacked` has before the row's own: layer, expert."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def counts(self, d: Dimensions) -> tuple[int, ...]:
        """The sizes of these axes."""
        return (d.layers, d.experts)[: len(self.index)]


def entries(rows: tuple[Row, ...], d: Dimensions) -> list[Entry]:
    """Every row at every layer and expert, in the order of the model: before the layers, the layers, after them."""
    repeated = [LAYER in row.megatron for row in rows]
    first = repeated.index(True)
    last = len(rows) - repeated[::-1].index(True)
    assert all(repeated[first:last]), "a family lists the rows of its layers together"
    return [
        *(Entry(row, None) for row in rows[:first]),
        *(
            Entry(row, layer, expert)
            for layer in range(d.layers)
            for row in rows[first:last]
            for expert in (range(d.experts) if EXPERT in row.names[0] else (None,))
        ),
        *(Entry(row, None) for row in rows[last:]),
    ]
