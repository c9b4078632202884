"""The adapters in a Megatron checkpoint, in Hugging Face's terms: one pair of matrices A and B for each HF weight.

Megatron's layer of queries, keys and values has three parts, that of gate and up projection two. Each part has its own
A; they are stacked. A family that fuses the same parts in one HF weight gets one pair of 3 or 2 times the rank, in
which each part's rows of B are zero outside its own columns: the product is the same.

Shapes: L layers, P parts, R rank, I input features, O output features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.mappings import Dimensions, Entry, ParameterMapping, entries
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.hf.megatron.megatron_model import AUXILIARY, TRAINING_STATE, disagreement
from megatron_sfr.model.lora.options import ADAPTER, KINDS
from megatron_sfr.storage.user_files import listed

WEIGHT, A, B = ".weight", f"{ADAPTER}lora_A", f"{ADAPTER}lora_B"


@dataclass(frozen=True)
class Pair:
    """The adapter of one HF weight [O, I]: scale * b @ a is added to it."""

    a: Tensor
    """[R, I]"""
    b: Tensor
    """[O, R]"""


def adaptable(mapping: ParameterMapping) -> bool:
    """Whether a mapping is that of a layer that LoRA adapts."""
    return any(mapping.megatron.endswith(f".{kind}{WEIGHT}") for kind in KINDS.values())


def part_rows(mapping: ParameterMapping, d: Dimensions) -> tuple[int, ...]:
    """Output features of each of Megatron's parts, in Hugging Face's order."""
    rows = mapping.megatron_shape(d)[0]
    if mapping.megatron.endswith(f".{KINDS['qkv']}{WEIGHT}"):
        return d.query, d.key_value, d.key_value
    return (rows // 2, rows // 2) if mapping.megatron.endswith(f".{KINDS['fc1']}{WEIGHT}") else (rows,)


def has_adapters(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is that of a run with LoRA."""
    return any(ADAPTER in key for key in checkpoint.tensors)


class StoredAdapter:
    """The adapters of a checkpoint by HF weight. Raises ValueError if checkpoint and config disagree."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        family, arguments = family_of(config), checkpoint.arguments()
        if not has_adapters(checkpoint):
            raise ValueError(f"{checkpoint.folder} holds no adapters: it is not of a run with lora_rank")
        if found := disagreement(arguments, family.flags(config)):
            flag, trained, meant = found
            raise ValueError(f"{checkpoint.folder}: trained with {flag} {trained}, but the config means {meant}")
        self.checkpoint, self.dimensions = checkpoint, family.dimensions(config)
        try:
            self.rank, self.alpha = int(arguments["lora_rank"]), float(arguments["lora_alpha"])
        except (KeyError, TypeError) as e:
            raise ValueError(f"{checkpoint.folder} does not record the rank and scale of its adapters") from e
        self.scale = self.alpha / self.rank
        todo = [x for x in entries(family.mappings(config), self.dimensions) if adaptable(x.mapping)]
        self.entries = [x for x in todo if self._key(x, A) is not None]
        self._check(config)

    def read(self, entry: Entry) -> tuple[Pair, ...]:
        """The pair of each of an entry's HF weights."""
        d, rows = self.dimensions, part_rows(entry.mapping, self.dimensions)
        a, b = self._read(entry, A), self._read(entry, B)
        parts = entry.mapping.split(b, d)
        if len(parts) == len(rows):
            return tuple(Pair(*x) for x in zip(a.split(self.rank), parts, strict=True))
        (fused,) = parts
        return (Pair(a, torch.block_diag(*fused.split(rows))),)

    def _key(self, entry: Entry, name: str) -> str | None:
        """The stored tensor with a matrix of an entry, None if the entry is not adapted."""
        keys = (x.removesuffix(WEIGHT) + name for x in (entry.single, entry.stacked))
        return next((key for key in keys if key in self.checkpoint.tensors), None)

    def _read(self, entry: Entry, name: str) -> Tensor:
        key = self._key(entry, name)
        assert key is not None
        index = entry.index if key.startswith(entry.stacked.removesuffix(WEIGHT)) else entry.index[1:]
        size = tuple(self.checkpoint.tensors[key].size)[len(index) :]
        return self.checkpoint.read(key, (*index, *(0 for _ in size)), (*(1 for _ in index), *size)).reshape(size)

    def _check(self, config: Config) -> None:
        """Raises ValueError for matrices of other sizes than the config's, and for tensors that no entry reads."""
        known = {key for entry in self.entries for name in (A, B) if (key := self._key(entry, name))}
        rest = (key for key in self.checkpoint.tensors if key not in known and not key.startswith(AUXILIARY))
        if unknown := [key for key in rest if not TRAINING_STATE.match(key)]:
            raise ValueError(f"{self.checkpoint.folder}: {listed(unknown)}: not an adapter of this architecture")
        for entry in self.entries:
            rows, columns = entry.mapping.megatron_shape(self.dimensions)
            parts = len(part_rows(entry.mapping, self.dimensions))
            for name, expected in ((A, (parts * self.rank, columns)), (B, (rows, self.rank))):
                key = self._key(entry, name)
                actual = tuple(self.checkpoint.tensors[key].size)[-2:] if key else None
                if actual != expected:
                    raise ValueError(
                        f"{self.checkpoint.folder}: {entry.single.removesuffix(WEIGHT)}{name} is {actual}, the config "
                        f"means {expected}: the config belongs to a different architecture"
                    )
