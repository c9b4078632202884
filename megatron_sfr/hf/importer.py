"""Hugging Face folder -> Megatron checkpoint, tensor by tensor, without building a model.

The checkpoint knows no layout, so any TP, PP, VPP loads it (`--load DIR`). It has exactly the vocabulary's rows: each
layout pads for itself (megatron-core marks both embeddings allow_shape_mismatch and zeroes what is not stored).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sfr.hf.checkpoint import CHUNK_BYTES, COMMON, TRACKER, Checkpoint, Piece, write_checkpoint
from megatron_sfr.hf.families import family_of
from megatron_sfr.hf.folder import Weights, new_folder, read_config
from megatron_sfr.hf.rows import LAYER, Config, Dimensions, Entry, Family, entries
from megatron_sfr.hf.stored import StoredModel

RELEASE = "release"
"""Megatron's name for a checkpoint that no run has written: training starts at step 0 with a fresh optimizer."""
COMMON_STATE = {
    "checkpoint_version": 3.0,  # the order of query, key and value in linear_qkv
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


@dataclass(frozen=True)
class ImportReport:
    """What was imported: number of HF tensors and their bytes, their dtypes, and whether they were read back."""

    output: Path
    tensors: int
    bytes: int
    dtypes: tuple[torch.dtype, ...]
    checked: bool


def import_hf(
    source: Path, output: Path, *, check: bool = False, force: bool = False, progress: bool = True
) -> ImportReport:
    """Writes `output` (a tracker file and `release/`), which Megatron's --load takes in any layout.

    check: reads everything back and compares it bit for bit with the source.
    """
    config = read_config(source)
    family = family_of(config)
    family.flags(config)  # refuses what Megatron would compute otherwise
    d = family.dimensions(config)
    todo = entries(family.rows(config), d.layers)
    weights = Weights(source)
    _check_names(weights, todo, family)
    dtypes = {entry: _check_entry(weights, entry, d) for entry in todo}
    _check_stacks(source, dtypes)
    size = sum(prod(entry.row.megatron_shape(d)) * dtype.itemsize for entry, dtype in dtypes.items())
    with new_folder(output, mark=TRACKER, force=force, size=size) as folder:
        with tqdm(total=size, unit="B", unit_scale=True, desc="import", disable=not progress) as bar:
            joined = _Joined(weights, d, bar)
            pieces = (piece for entry in todo for piece in _pieces(entry, d, dtypes[entry], joined))
            write_checkpoint(folder / RELEASE, pieces, _objects(family, d))
        (folder / TRACKER).write_text(RELEASE)
        if check:
            check_import(folder / RELEASE, config, weights, progress=progress)
    return ImportReport(output, len(weights.files), size, tuple(dict.fromkeys(dtypes.values())), check)


def check_import(folder: Path, config: Config, weights: Weights, *, progress: bool = True) -> None:
    """ValueError unless the checkpoint gives back the very bits of the HF folder."""
    model = StoredModel(Checkpoint(folder), config)
    for entry in tqdm(model.entries, unit="tensor", desc="check", disable=not progress):
        for name, tensor in zip(entry.names, model.read(entry), strict=True):
            if not torch.equal(_bits(tensor), _bits(weights[name])):
                raise ValueError(f"{folder}: {name} was not read back as it was written: is the disk sound?")


class _Joined:
    """Megatron's tensor of an entry; holds the last one, whose boxes are asked for in turn."""

    def __init__(self, weights: Weights, d: Dimensions, bar: "tqdm[Any]") -> None:
        self._weights, self._d, self._bar = weights, d, bar
        self._entry: Entry | None = None
        self._tensor = torch.empty(0)

    def box(self, entry: Entry, axis: int, start: int, stop: int) -> Tensor:
        if entry is not self._entry:
            self._entry, self._tensor = entry, torch.empty(0)  # let go before the next is read
            self._tensor = entry.row.join(tuple(self._weights[name] for name in entry.names), self._d)
        box = self._tensor.narrow(axis, start, stop - start)
        self._bar.update(box.nbytes)
        return box if entry.layer is None else box[None]


def _pieces(entry: Entry, d: Dimensions, dtype: torch.dtype, joined: _Joined) -> Iterator[Piece]:
    """Boxes of at most CHUNK_BYTES, cut along the axis that tensor parallelism cuts."""
    size, axis = entry.row.megatron_shape(d), entry.row.tp_dim or 0
    count = min(ceil(prod(size) * dtype.itemsize / CHUNK_BYTES), size[axis])
    bounds = [size[axis] * i // count for i in range(count + 1)]
    layers, layer = ((), ()) if entry.layer is None else ((d.layers,), (entry.layer,))
    for start, stop in pairwise(bounds):
        offset = tuple(start if i == axis else 0 for i in range(len(size)))
        box = tuple(stop - start if i == axis else n for i, n in enumerate(size))
        yield Piece(
            key=entry.stacked,
            whole=(*layers, *size),
            dtype=dtype,
            offset=(*layer, *offset),
            size=(*(1 for _ in layer), *box),
            make=lambda start=start, stop=stop: joined.box(entry, axis, start, stop),  # type: ignore[misc]
        )


def _objects(family: Family, d: Dimensions) -> dict[str, object]:
    """The common state, and the empty extra states without which megatron-core 0.19.2 does not load a model."""
    objects: dict[str, object] = {COMMON: COMMON_STATE}
    for module in family.extra_states:
        key = module.replace(f"{LAYER}.", "") + "._extra_state/shard"
        shards = range(d.layers) if LAYER in module else range(1)
        objects |= {f"{key}_{i}_{len(shards)}": None for i in shards}
    return objects


def _check_names(weights: Weights, todo: list[Entry], family: Family) -> None:
    wanted = {name for entry in todo for name in entry.names}
    missing, unknown = sorted(wanted - weights.files.keys()), sorted(weights.files.keys() - wanted)
    copy, original = family.tied
    if copy in unknown and original in wanted:
        if not torch.equal(_bits(weights[copy]), _bits(weights[original])):
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


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)  # -0.0 is not 0.0, and a NaN is itself
