"""A complete model in an HF folder or GGUF file: checks config against weights by name, and reads any chunk in the form
of Megatron."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.gguf.gguf_file import GGUFWeights, read_gguf, read_model_config
from megatron_sfr.hf.hf_folder import Weights
from megatron_sfr.hf.mappings import Dimensions, Entry, Family, entries
from megatron_sfr.storage.model_folders import find_gguf

ROTARY_BUFFER = "rotary_emb.inv_freq"
_OF_QUANTIZED = re.compile(
    r"\.(weight_(scale(_inv|_2)?|packed|zero_point)|input_scale|qweight|qzeros|scales|biases|g_idx|absmax|quant_map)$"
)
"""Names of tensors beside quantized weights. config.json may not mention these (MLX, Model Optimizer)."""


@dataclass(frozen=True)
class Source:
    """The model in an HF folder or GGUF file, in Megatron's terms; `open_source` makes one."""

    config: Config
    family: Family
    flags: dict[str, object]
    dimensions: Dimensions
    weights: Weights | GGUFWeights
    dtypes: dict[Entry, torch.dtype]
    """Every entry of the model, and its dtype."""

    def read(self, entry: Entry, start: int, stop: int) -> Tensor:
        """start..stop of Megatron's tensor along its tensor-parallel axis (the first axis if it has none).

        Both are multiples of the mapping's grain. Raises ValueError if a value is NaN or infinite: a run that starts
        from it may train, but can never save.
        """
        axis, d = entry.mapping.tp_dim or 0, self.dimensions
        parts = []
        for name, spans in zip(entry.names, entry.mapping.spans(start, stop, d), strict=True):
            found = [self.weights.part(name, axis, *span) for span in spans]
            parts.append(found[0] if len(found) == 1 else torch.cat(found, dim=axis))
        tensor = entry.mapping.join(tuple(parts), d)
        if tensor.numel() and not all(isfinite(x) for x in tensor.aminmax()):
            raise ValueError(
                f"{self.weights.folder}: {', '.join(entry.names)}: values are NaN or infinite; copy the model again, "
                "or repair what wrote it"
            )
        return tensor


def open_source(folder: Path) -> Source:
    """Checks everything that needs no weights. Raises ValueError for missing, unknown or different tensors."""
    config, gguf = read_model_config(folder), find_gguf(folder)
    family = family_of(config)
    flags = family.flags(config)  # refuses what Megatron would compute differently
    d = family.dimensions(config)
    todo = entries(family.mappings(config), d)
    weights = Weights(folder) if gguf is None else read_gguf(gguf, config)
    _check_names(weights, todo, family, _rotary_buffers(weights, flags, d))
    dtypes = {entry: _check_entry(weights, entry, d) for entry in todo}
    _check_stacks(folder, dtypes)
    return Source(config, family, flags, d, weights, dtypes)


def _rotary_buffers(weights: Weights | GGUFWeights, flags: Mapping[str, object], d: Dimensions) -> set[str]:
    """Names of stored rotary frequencies, which transformers wrote until 2023.

    They are not weights: they follow from rope_theta and the size of a head. Raises ValueError if config.json's differ.
    """
    names = {name for name in weights.files if name.endswith(ROTARY_BUFFER)}
    theta = flags.get("rotary_base")
    if not names or not isinstance(theta, int) or flags.get("use_rope_scaling"):
        return set()
    expected = theta ** -(torch.arange(0, d.head_dim, 2, dtype=torch.float64) / d.head_dim)
    for name in sorted(names):
        stored = weights[name]
        tolerance = max(1e-5, 2 * torch.finfo(weights.dtype(name)).eps)
        if stored.shape != expected.shape or not torch.allclose(stored.double(), expected, rtol=tolerance, atol=0):
            raise ValueError(
                f"{weights.folder / weights.files[name]}: {name} has other rotary frequencies than config.json's "
                f"rope_theta {theta} and heads of {d.head_dim} give: config and weights belong to different models"
            )
    return names


def _check_names(weights: Weights | GGUFWeights, todo: list[Entry], family: Family, buffers: set[str]) -> None:
    expected = {name for entry in todo for name in entry.names}
    missing, unknown = sorted(expected - weights.files.keys()), sorted(weights.files.keys() - expected - buffers)
    copy, original = family.tied
    if copy in unknown and original in expected:
        if not torch.equal(bits(weights[copy]), bits(weights[original])):
            raise ValueError(
                f"{weights.folder}: {copy} is not {original}, but config.json has tie_word_embeddings: true"
            )
        unknown.remove(copy)
    if missing == [copy]:
        raise ValueError(
            f"{weights.folder}: missing {copy}: copy the model again, or set tie_word_embeddings: true in config.json "
            f"if it is {original}"
        )
    if any(_OF_QUANTIZED.search(name) for name in unknown):
        raise ValueError(f"{weights.folder}: {unknown[0]}: the weights are quantized; start from the unquantized model")
    if missing:
        raise ValueError(f"{weights.folder}: missing {', '.join(missing)}, which config.json implies")
    if unknown:
        raise ValueError(f"{weights.folder}: {', '.join(unknown)}: no weight of config.json's architecture")


def _check_entry(weights: Weights | GGUFWeights, entry: Entry, d: Dimensions) -> torch.dtype:
    for name, shape in zip(entry.names, entry.mapping.shapes(d), strict=True):
        if weights.shape(name) != shape:
            said = f"{name} is {list(weights.shape(name))}, config.json means {list(shape)}"
            raise ValueError(f"{weights.folder}: {said}: config and weights belong to different models")
    dtypes = {weights.dtype(name) for name in entry.names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{weights.folder}: {', '.join(entry.names)} differ in dtype, but are one tensor in Megatron: "
            "save the model in one dtype"
        )
    return dtypes.pop()


def _check_stacks(source: Path, dtypes: dict[Entry, torch.dtype]) -> None:
    stacks: dict[str, set[torch.dtype]] = defaultdict(set)
    for entry, dtype in dtypes.items():
        stacks[entry.stacked].add(dtype)
    for key, found in stacks.items():
        if len(found) > 1:
            raise ValueError(
                f"{source}: the layers of {key} differ in dtype, but are one tensor in Megatron: save the model in one "
                "dtype"
            )


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
