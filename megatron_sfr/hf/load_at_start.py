"""Training directly from a Hugging Face folder, or on the frozen weights of a checkpoint: each rank reads only the
chunks of its own parameters.

The extension point is upstream's: `pre_wrap_hooks` of its model config run on the bare model, before the optimizer
copies fp32 weights from it. `sharded_state_dict` gives the tensor and the chunk of each parameter, as for a checkpoint,
so tensor parallelism, pipeline stages, tied embeddings and padded vocabularies need no code here.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    gpt_compatible_layer_maps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule

from megatron_sfr.hf.hf_model import Source, open_source
from megatron_sfr.hf.mappings import Entry, Section
from megatron_sfr.hf.megatron.hybrid_names import PATTERN, comparable, is_hybrid
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import AUXILIARY, COMPARED, check_imported, disagreement
from megatron_sfr.option_names import named


@named("sfr_")
@dataclass(frozen=True)
class StartOptions:
    """Starting weights of a run that has no checkpoint."""

    hf_load: str | None = None
    """Folder of a Hugging Face model to start from without converting it first: each rank reads its own part. Or a GGUF
    file, which each rank de-quantizes completely. The flow head is newly initialized. A run whose --load holds a
    checkpoint resumes from that; with --lora-rank the model is read at every start. Default: none."""


def start_from(folder: Path, args: argparse.Namespace) -> Callable[[list[MegatronModule]], list[MegatronModule]]:
    """A pre-wrap hook that loads an HF folder or GGUF file into the model. Raises ValueError if the arguments describe
    another model."""
    source = open_source(folder)
    if found := disagreement(comparable(vars(args), source.flags), source.flags):
        flag, said, meant = found
        raise ValueError(
            f"the run has {flag} {said}, but {folder} means {meant}: `megatron-sfr convert recipe --hf {folder}` "
            "prints the model's part of the recipe"
        )
    if args.vocab_size < source.dimensions.vocab:
        raise ValueError(f"--vocab-size {args.vocab_size} is less than the {source.dimensions.vocab} of {folder}")
    return lambda chunks: fill(chunks, _filler_from_hf(source), renamed=not is_hybrid(source.flags))


@torch.no_grad()
def fill(
    chunks: list[MegatronModule], fill_tensor: Callable[[ShardedTensor], None], *, renamed: bool = True
) -> list[MegatronModule]:
    """Loads this rank's model chunks, each parameter exactly once. Raises ValueError naming parameters that are missed.

    Only the flow head and multi-token prediction, which no base has, keep their initialization.

    Args:
        fill_tensor: writes the base's values into a tensor. Raises ValueError if the base does not have them.
        renamed: whether the tensors of a hybrid model are requested by GPTModel's names.
    """
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        if renamed and (pattern := getattr(chunk, PATTERN, None)) is not None:
            retarget_sharded_state_dict_to_gpt_checkpoint(state, gpt_compatible_layer_maps(pattern))
        apply_factories(state)
        filled: dict[int, int] = {}
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and not tensor.key.startswith(AUXILIARY):
                fill_tensor(tensor)
                storage = tensor.data.untyped_storage().data_ptr()
                filled[storage] = filled.get(storage, 0) + tensor.data.numel()
        _check_filled(chunk, filled)
    return chunks


def _filler_from_hf(source: Source) -> Callable[[ShardedTensor], None]:
    """Returns the function that fills a tensor from a Hugging Face folder."""
    places: dict[tuple[str, tuple[int, ...]], tuple[Entry, Section]] = {}
    for entry in source.dtypes:
        for section in entry.sections(source.dimensions):
            places[entry.stacked + section.end, entry.index] = entry, section
            if entry.layer is not None:
                places[entry.single + section.end, entry.index[1:]] = entry, section

    def fill_tensor(tensor: ShardedTensor) -> None:
        place = places.get((tensor.key, tensor.global_offset[: tensor.prepend_axis_num]))
        if place is None:
            raise ValueError(f"{source.weights.folder} has nothing for {tensor.key}, which these flags ask for")
        _fill_from_hf(tensor, *place, source)

    return fill_tensor


def _fill_from_hf(tensor: ShardedTensor, entry: Entry, section: Section, source: Source) -> None:
    """Copies the chunk of an entry's section that a sharded tensor covers. Vocabulary padding becomes zero."""
    offset, shape = tensor.global_offset[tensor.prepend_axis_num :], tensor.global_shape[tensor.prepend_axis_num :]
    expected = section.shape
    padding = entry.mapping.padded and shape[0] > expected[0] and shape[1:] == expected[1:]
    if shape != expected and not padding:
        raise ValueError(
            f"{source.weights.folder}: {tensor.key} is {list(expected)}, these flags build {list(shape)}: "
            f"`megatron-sfr convert recipe --hf {source.weights.folder}` prints those of this model"
        )
    axis, grain = entry.mapping.tp_dim or 0, entry.mapping.grain(source.dimensions)
    start, stop = (min(x, expected[axis]) for x in (offset[axis], offset[axis] + tensor.local_shape[axis]))
    if start % grain or stop % grain:
        raise ValueError(f"{tensor.key}: tensor_model_parallel_size cuts inside a group of heads: choose a smaller one")
    uncut = zip(tensor.local_shape, shape, strict=True)
    assert all(here == whole for i, (here, whole) in enumerate(uncut) if i != axis), f"{tensor.key} is cut otherwise"
    tensor.data.zero_()
    if stop > start:
        tensor.data.narrow(axis, 0, stop - start).copy_(source.read(entry, section.start + start, section.start + stop))


def base_from(folder: Path, args: argparse.Namespace) -> Callable[[list[MegatronModule]], list[MegatronModule]]:
    """A pre-wrap hook that loads a Megatron checkpoint into the model, without its flow head. Raises ValueError if the
    arguments describe another model."""
    checkpoint = Checkpoint(find_checkpoint(folder))
    stored = checkpoint.arguments()
    for name in COMPARED.values():
        if name in stored and stored[name] != getattr(args, name):
            raise ValueError(f"the run has {name} {getattr(args, name)}, but {checkpoint.folder} has {stored[name]}")
    check_imported(vars(args), checkpoint)
    return lambda chunks: fill(chunks, partial(_fill_from_checkpoint, checkpoint=checkpoint))


def _fill_from_checkpoint(tensor: ShardedTensor, checkpoint: Checkpoint) -> None:
    """Copies the chunk of a checkpoint's tensor that a sharded tensor covers. Vocabulary padding becomes zero."""
    if (stored := checkpoint.tensors.get(tensor.key)) is None:
        raise ValueError(f"{checkpoint.folder} has no {tensor.key}, which these flags ask for")
    if tuple(stored.size) != tensor.global_shape and not tensor.allow_shape_mismatch:
        raise ValueError(
            f"{checkpoint.folder}: {tensor.key} is {list(stored.size)}, these flags build {list(tensor.global_shape)}"
        )
    size = [1] * tensor.prepend_axis_num + list(tensor.local_shape)
    kept = [max(0, min(n, w - o)) for n, w, o in zip(size, stored.size, tensor.global_offset, strict=True)]
    tensor.data.zero_()
    if all(kept):
        part = checkpoint.read(tensor.key, tensor.global_offset, kept)[(0,) * tensor.prepend_axis_num]
        tensor.data[tuple(slice(n) for n in part.shape)] = part.to(tensor.data)


def _check_filled(chunk: MegatronModule, filled: dict[int, int]) -> None:
    """Raises ValueError unless each parameter was loaded completely and once."""
    wrong = [
        name
        for name, parameter in chunk.named_parameters()
        if not name.startswith(AUXILIARY) and filled.get(parameter.untyped_storage().data_ptr()) != parameter.numel()
    ]
    if wrong:
        raise ValueError(f"these parameters would not start from the given weights: {', '.join(wrong)}")
