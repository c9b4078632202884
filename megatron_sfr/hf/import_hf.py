"""Hugging Face folder or GGUF file -> Megatron checkpoint, tensor by tensor, without building a model.

The checkpoint is independent of the layout, so any TP, PP, VPP loads it (`--load DIR`). Its vocabulary is not padded: a
layout pads when it loads (megatron-core marks both embeddings allow_shape_mismatch and zeroes what is not stored).
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sfr.hf.config_values import Config
from megatron_sfr.hf.end_tokens import keep_tokens
from megatron_sfr.hf.gguf.gguf_file import GGUFHeader, GGUFWeights, model_contents
from megatron_sfr.hf.hf_folder import WEIGHT_FILES, Weights, is_up_to_date, new_folder
from megatron_sfr.hf.hf_model import Source, bits, open_source
from megatron_sfr.hf.mappings import EXPERT, LAYER, Entry
from megatron_sfr.hf.megatron.hybrid_names import PATTERN, is_hybrid
from megatron_sfr.hf.megatron.megatron_checkpoint import CHUNK_BYTES, COMMON, FLAGS, Checkpoint, Chunk, write_checkpoint
from megatron_sfr.hf.megatron.megatron_model import StoredModel
from megatron_sfr.hf.megatron.tracker import RELEASE, TRACKER

COMMON_STATE = {
    "checkpoint_version": 3.0,  # the order of query, key and value in linear_qkv
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


@dataclass(frozen=True)
class ImportReport:
    """What was imported: number, bytes and dtypes of the HF tensors, and whether they were read back."""

    output: Path
    tensors: int
    bytes: int
    dtypes: tuple[torch.dtype, ...]
    checked: bool
    up_to_date: bool
    """Whether the same import had already written the output."""
    gguf: GGUFHeader | None = None
    """The GGUF file that was read; None for a Hugging Face folder."""


def import_hf(
    source: str | Path, output: str | Path, *, check: bool = False, force: bool = False, progress: bool = True
) -> ImportReport:
    """Converts a Hugging Face model to a Megatron checkpoint, which --load takes in any parallel layout.

    An output that the same import has written stays as it is.

    Args:
        source: folder of the Hugging Face model, or a GGUF file, which transformers de-quantizes.
        output: folder to write: a tracker file and `release/`.
        check: read everything back and compare it bit for bit with the source.
        force: replace an output of another import.
        progress: show a progress bar.
    Returns:
        What was imported.
    Raises:
        ValueError: the family or an option of the model is not supported, or files are missing or damaged.
    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.import_hf("model", "start", check=True, progress=False).checked
        True
    """
    source, output = Path(source), Path(output)
    model = open_source(source)
    d = model.dimensions
    size = sum(prod(entry.mapping.megatron_shape(d)) * dtype.itemsize for entry, dtype in model.dtypes.items())
    identity = {"command": "convert import", "hf": model_contents(source, WEIGHT_FILES)}
    if done := is_up_to_date(output, identity, force=force):
        if check:
            check_import(output / RELEASE, model.config, model.weights, progress=progress)
    else:
        _write(model, source, output, identity, size, check=check, force=force, progress=progress)
    dtypes = tuple(dict.fromkeys(model.dtypes.values()))
    gguf = model.weights.header if isinstance(model.weights, GGUFWeights) else None
    return ImportReport(output, len(model.weights.files), size, dtypes, checked=check, up_to_date=done, gguf=gguf)


def _write(
    model: Source,
    source: Path,
    output: Path,
    identity: Mapping[str, object],
    size: int,
    *,
    check: bool,
    force: bool,
    progress: bool,
) -> None:
    with new_folder(output, force=force, size=size, identity=identity) as folder:
        with tqdm(total=size, unit="B", unit_scale=True, desc="import", disable=not progress) as bar:
            chunks = (chunk for entry in model.dtypes for chunk in _chunks(model, entry, bar))
            write_checkpoint(folder / RELEASE, chunks, _objects(model))
        keep_tokens(source, folder)
        (folder / TRACKER).write_text(RELEASE)
        if check:
            check_import(folder / RELEASE, model.config, model.weights, progress=progress)


def check_import(folder: Path, config: Config, weights: Weights | GGUFWeights, *, progress: bool = True) -> None:
    """Raises ValueError unless the checkpoint equals the source bit for bit."""
    model = StoredModel(Checkpoint(folder), config)
    for entry in tqdm(model.entries, unit="tensor", desc="check", disable=not progress):
        for name, tensor in zip(entry.names, model.read(entry), strict=True):
            if not torch.equal(bits(tensor), bits(weights[name])):
                raise ValueError(f"{folder}: {name} was not read back as it was written: is the disk sound?")


def _chunks(model: Source, entry: Entry, bar: "tqdm[Any]") -> Iterator[Chunk]:
    """Chunks of at most about CHUNK_BYTES, split along the tensor-parallel axis; each is read when it is written."""
    d, dtype = model.dimensions, model.dtypes[entry]
    axis, grain = entry.mapping.tp_dim or 0, entry.mapping.grain(d)
    index, counts = entry.index, entry.counts(d)
    for end, first, size in entry.sections(d):
        count = min(ceil(prod(size) * dtype.itemsize / CHUNK_BYTES), size[axis] // grain)
        bounds = [size[axis] // grain * i // count * grain for i in range(count + 1)]
        for start, stop in pairwise(bounds):
            offset = tuple(start if i == axis else 0 for i in range(len(size)))
            box = (*(1 for _ in index), *(stop - start if i == axis else n for i, n in enumerate(size)))

            def make(start: int = first + start, stop: int = first + stop, box: tuple[int, ...] = box) -> Tensor:
                bar.update(prod(box) * dtype.itemsize)
                return model.read(entry, start, stop).reshape(box)

            yield Chunk(entry.stacked + end, (*counts, *size), dtype, (*index, *offset), box, make)


def _objects(model: Source) -> dict[str, object]:
    """The common state, and the empty extra states without which megatron-core 0.19.2 does not load a model."""
    d = model.dimensions
    objects: dict[str, object] = {COMMON: {**COMMON_STATE, **_layers(model.flags), FLAGS: dict(model.flags)}}
    for module in model.family.extra_states(model.config):
        axes = [n for place, n in ((LAYER, d.layers), (EXPERT, d.experts)) if place in module] or [1]
        key = module.replace(f"{LAYER}.", "").replace(f"{EXPERT}.", "") + "._extra_state/shard"
        whole = ".".join(map(str, axes))
        objects |= {f"{key}_{'.'.join(map(str, at))}_{whole}": None for at in product(*map(range, axes))}
    return objects


def _layers(flags: Mapping[str, object]) -> dict[str, object]:
    """The arguments by which upstream recognizes a checkpoint of HybridModel, and what it compares without --finetune.

    Without them megatron-core 0.19.2 takes it to be of GPTModel, and loads no Mamba layer.
    """
    if not is_hybrid(flags):
        return {}
    pattern = str(flags[PATTERN])
    compared = {name: flags[name] for name in ("hidden_size", "num_attention_heads")}
    return {"args": Namespace(**{PATTERN: pattern, "num_layers": len(pattern)}, **compared)}
