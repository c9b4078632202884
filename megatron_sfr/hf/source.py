"""An HF folder that is a whole model: config and weights agree name by name, and any box of Megatron's can be read."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.families import family_of
from megatron_sfr.hf.folder import Weights, read_config
from megatron_sfr.hf.rows import Config, Dimensions, Entry, Family, entries


@dataclass(frozen=True)
class Source:
    """The model in an HF folder, in Megatron's terms; `open_source` makes one."""

    config: Config
    family: Family
    flags: dict[str, object]
    dimensions: Dimensions
    weights: Weights
    dtypes: dict[Entry, torch.dtype]
    """Every entry of the model, and its dtype."""

    def read(self, entry: Entry, start: int, stop: int) -> Tensor:
        """start..stop of Megatron's tensor along the axis that tensor parallelism cuts (the first, where it does not).

        Both are multiples of the row's grain.
        """
        axis, d = entry.row.tp_dim or 0, self.dimensions
        spans = zip(entry.names, entry.row.spans(start, stop, d), strict=True)
        return entry.row.join(tuple(self.weights.part(name, axis, *span) for name, span in spans), d)


def open_source(folder: Path) -> Source:
    """Checks all that can be checked without reading weights; ValueError for what is missing, too much, or differs."""
    config = read_config(folder)
    family = family_of(config)
    flags = family.flags(config)  # refuses what Megatron would compute otherwise
    d = family.dimensions(config)
    todo = entries(family.rows(config), d)
    weights = Weights(folder)
    _check_names(weights, todo, family)
    dtypes = {entry: _check_entry(weights, entry, d) for entry in todo}
    _check_stacks(folder, dtypes)
    return Source(config, family, flags, d, weights, dtypes)


def _check_names(weights: Weights, todo: list[Entry], family: Family) -> None:
    wanted = {name for entry in todo for name in entry.names}
    missing, unknown = sorted(wanted - weights.files.keys()), sorted(weights.files.keys() - wanted)
    copy, original = family.tied
    if copy in unknown and original in wanted:
        if not torch.equal(bits(weights[copy]), bits(weights[original])):
            raise ValueError(
                f"{weights.folder}: {copy} is not {original}, but config.json has tie_word_embeddings: true"
            )
        unknown.remove(copy)
    if missing:
        raise ValueError(f"{weights.folder}: missing {', '.join(missing)}, which config.json implies")
    if unknown:
        raise ValueError(f"{weights.folder}: {', '.join(unknown)}: no weight of config.json's architecture")


def _check_entry(weights: Weights, entry: Entry, d: Dimensions) -> torch.dtype:
    for name, shape in zip(entry.names, entry.row.shapes(d), strict=True):
        if weights.shape(name) != shape:
            said = f"{name} is {list(weights.shape(name))}, config.json means {list(shape)}"
            raise ValueError(f"{weights.folder}: {said}: config and weights are of different models")
    dtypes = {weights.dtype(name) for name in entry.names}
    if len(dtypes) > 1:
        raise ValueError(f"{weights.folder}: {', '.join(entry.names)} differ in dtype, but are one tensor in Megatron")
    return dtypes.pop()


def _check_stacks(source: Path, dtypes: dict[Entry, torch.dtype]) -> None:
    stacks: dict[str, set[torch.dtype]] = defaultdict(set)
    for entry, dtype in dtypes.items():
        stacks[entry.stacked].add(dtype)
    for key, found in stacks.items():
        if len(found) > 1:
            raise ValueError(f"{source}: the layers of {key} differ in dtype, but are one tensor in Megatron")


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.contiguous().view(torch.uint8)
