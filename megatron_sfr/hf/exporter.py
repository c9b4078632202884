"""Megatron checkpoint -> Hugging Face folder, in one process: one tensor read at a time, one shard held in memory."""

import json
import shutil
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_sfr.hf.checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.folder import CONFIG, INDEX, SINGLE, new_folder, read_config
from megatron_sfr.hf.rows import Config
from megatron_sfr.hf.stored import StoredModel

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
)
"""What is copied beside the config: tokenizer, chat template, generation config, licence."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportReport:
    """What was exported, from which checkpoint, and what was left behind by name."""

    output: Path
    checkpoint: Path
    tensors: int
    bytes: int
    files: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dropped: tuple[str, ...]
    padding: int
    """Rows of vocabulary padding that were cut off."""


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    like: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Writes `output`, which AutoModelForCausalLM loads, from a checkpoint or the newest of a --save folder.

    like: an HF folder whose config, tokenizer, chat template and generation config are those of the model.
    dtype: of the weights; by default as the checkpoint has them, so that nothing is rounded unasked.
    """
    config = read_config(like)
    model = StoredModel(Checkpoint(find_checkpoint(checkpoint)), config)
    sizes = _sizes(model, dtype)
    files = _files(sizes, shard_bytes)
    dtypes = tuple(dict.fromkeys(dtype or model.dtype(entry) for entry in model.entries))
    if output.resolve() == like.resolve():
        raise ValueError(f"{output} is the folder of --like: choose another --output")
    with new_folder(output, mark=CONFIG, force=force) as folder:
        _copy(like, folder)
        _write_config(config, dtypes, folder / CONFIG)
        _write_weights(model, files, dtype, folder, sum(sizes.values()), progress)
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return ExportReport(
        output=output,
        checkpoint=model.checkpoint.folder,
        tensors=len(sizes),
        bytes=sum(sizes.values()),
        files=tuple(dict.fromkeys(files.values())),
        dtypes=dtypes,
        dropped=model.dropped,
        padding=model.padding,
    )


def _sizes(model: StoredModel, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of each HF tensor, in the order of the model."""
    return {
        name: prod(shape) * (dtype or model.dtype(entry)).itemsize
        for entry in model.entries
        for name, shape in zip(entry.names, entry.row.shapes(model.dimensions), strict=True)
    }


def _files(sizes: dict[str, int], shard_bytes: int) -> dict[str, str]:
    """Tensor name -> file: a shard ends before the tensor that would overfill it."""
    shards, filled = dict.fromkeys(sizes, 0), 0
    shard = 0
    for name, size in sizes.items():
        if filled and filled + size > shard_bytes:
            shard, filled = shard + 1, 0
        shards[name], filled = shard, filled + size
    if shard == 0:
        return dict.fromkeys(sizes, SINGLE)
    return {name: f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for name, i in shards.items()}


def _write_weights(
    model: StoredModel, files: dict[str, str], dtype: torch.dtype | None, folder: Path, total: int, progress: bool
) -> None:
    parts = (item for entry in model.entries for item in zip(entry.names, model.read(entry), strict=True))
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
        for file, group in groupby(parts, key=lambda item: files[item[0]]):
            shard: dict[str, Tensor] = {}
            for name, tensor in group:
                # A copy: parts of one tensor share memory, which safetensors refuses.
                shard[name] = tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
                bar.update(shard[name].nbytes)
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except SafetensorError as e:  # a full disk
                raise OSError(f"{folder / file}: {e}") from e
            (folder / file).chmod((folder / CONFIG).stat().st_mode)  # safetensors 0.8 writes for the owner alone


def _write_config(config: Config, dtypes: tuple[torch.dtype, ...], path: Path) -> None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 5 renamed it, and reads both
    dtype = str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else config.get(key)
    path.write_text(json.dumps({**config, key: dtype}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(like: Path, folder: Path) -> None:
    for file in sorted({file for pattern in COMPANIONS for file in like.glob(pattern) if file.is_file()}):
        target = folder / file.relative_to(like)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
