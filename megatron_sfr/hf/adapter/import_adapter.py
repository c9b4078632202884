"""PEFT's folder -> a Megatron checkpoint of adapters, which --pretrained-checkpoint takes beside the base's weights.

A layer of queries, keys and values of which PEFT adapts some gets matrices of zeros for the others: their gradients are
zero too, so they stay as PEFT has them.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.adapter.export_adapter import AdapterReport
from megatron_sfr.hf.adapter.peft_folder import CONFIG, WEIGHTS, PeftAdapter, read_peft
from megatron_sfr.hf.adapter.stored_adapter import WEIGHT, A, B, adaptable, part_rows
from megatron_sfr.hf.families.family_registry import family_of
from megatron_sfr.hf.hf_folder import is_up_to_date, new_folder, read_config
from megatron_sfr.hf.import_hf import COMMON_STATE
from megatron_sfr.hf.mappings import Dimensions, Entry, entries
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, Chunk, write_checkpoint
from megatron_sfr.hf.megatron.tracker import RELEASE, TRACKER
from megatron_sfr.model.lora.options import KINDS
from megatron_sfr.storage.provenance import contents_of
from megatron_sfr.storage.user_files import listed


def import_adapter(adapter: str | Path, output: str | Path, *, hf: str | Path, force: bool = False) -> AdapterReport:
    """Converts a PEFT folder to a Megatron checkpoint of adapters.

    Args:
        adapter: the folder that PEFT wrote.
        output: folder to write: a tracker file and `release/`.
        hf: the Hugging Face folder of the base model.
        force: replace an output of another import.
    Raises:
        ValueError: it is not plain LoRA of one rank, or adapts what Megatron's LoRA leaves alone.
    """
    adapter, output, hf = Path(adapter), Path(output), Path(hf)
    found, config = read_peft(adapter), read_config(hf)
    family = family_of(config)
    d = family.dimensions(config)
    todo = [x for x in entries(family.mappings(config), d) if adaptable(x.mapping) and x.expert is None]
    adapted = {x.stacked for x in todo if any((name, "A") in found.matrices for name in x.names)}
    todo = [x for x in todo if x.stacked in adapted]
    known = {(name, matrix) for x in todo for name in x.names for matrix in "AB"}
    if unknown := {name for name, _ in found.matrices.keys() - known}:
        raise ValueError(f"{adapter / WEIGHTS}: {listed(unknown)}: LoRA here adapts linear layers of attention and MLP")
    chunks = [chunk for entry in todo for chunk in _chunks(found, entry, d)]
    chunks = [_of_one_dtype(chunk, chunks[0].dtype) for chunk in chunks]
    targets = ",".join(kind for kind, name in KINDS.items() if any(x.endswith(name + WEIGHT) for x in adapted))
    options = {"lora_rank": found.rank, "lora_alpha": found.alpha, "lora_targets": targets}
    size = sum(x.size[-1] * x.size[-2] * x.dtype.itemsize for x in chunks)
    inputs = {"adapter": contents_of(adapter, (CONFIG, WEIGHTS)), "hf": contents_of(hf, ("config.json",))}
    identity = {"command": "convert import --adapter", **inputs}
    if not (done := is_up_to_date(output, identity, force=force)):
        with new_folder(output, force=force, size=size, identity=identity) as folder:
            write_checkpoint(folder / RELEASE, chunks, {COMMON: {**COMMON_STATE, "lora": options}})
            (folder / TRACKER).write_text(RELEASE)
    return AdapterReport(output, output / RELEASE, len(found.matrices), size, found.rank, found.alpha, targets, done)


def _of_one_dtype(chunk: Chunk, dtype: torch.dtype) -> Chunk:
    if chunk.dtype != dtype:
        raise ValueError(f"{chunk.key} is {chunk.dtype}, other matrices are {dtype}: save the adapter in one dtype")
    return chunk


def _chunks(found: PeftAdapter, entry: Entry, d: Dimensions) -> Iterator[Chunk]:
    """A and B of one of Megatron's layers."""
    rows, columns = part_rows(entry.mapping, d), entry.mapping.megatron_shape(d)[1]
    given = [_pair(found, name, shape) for name, shape in zip(entry.names, entry.mapping.shapes(d), strict=True)]
    if len(given) < len(rows):  # one HF weight holds all parts, which share its A
        a_parts = [given[0][0]] * len(rows)
    else:
        a_parts = [a for a, _ in given]
    a, b = torch.cat(a_parts), entry.mapping.join(tuple(b for _, b in given), d)
    assert a.shape == (len(rows) * found.rank, columns)
    for name, tensor in ((A, a), (B, b)):
        key, counts, shape = entry.stacked.removesuffix(WEIGHT) + name, entry.counts(d), tuple(tensor.shape)
        offset, size = (*entry.index, 0, 0), (*(1 for _ in counts), *shape)
        yield Chunk(key, (*counts, *shape), tensor.dtype, offset, size, partial(tensor.reshape, size))


def _pair(found: PeftAdapter, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A and B of an HF weight [O, I]; zeros if it is not adapted."""
    pair = []
    dtype = next(iter(found.matrices.values())).dtype
    for matrix, size in (("A", (found.rank, shape[1])), ("B", (shape[0], found.rank))):
        tensor = found.matrices.get((name, matrix))
        if tensor is None and (name, "AB".replace(matrix, "")) in found.matrices:
            raise ValueError(f"{WEIGHTS}: {name} has no lora_{matrix}: the adapter is not complete")
        if tensor is not None and tuple(tensor.shape) != size:
            raise ValueError(
                f"{WEIGHTS}: lora_{matrix} of {name} is {list(tensor.shape)}, rank and config.json mean {list(size)}"
            )
        pair.append(torch.zeros(size, dtype=dtype) if tensor is None else tensor)
    return pair[0], pair[1]
