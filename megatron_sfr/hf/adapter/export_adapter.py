"""The adapters of a Megatron checkpoint -> PEFT's folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sfr.hf.adapter import peft_folder
from megatron_sfr.hf.adapter.stored_adapter import StoredAdapter
from megatron_sfr.hf.hf_folder import CONFIG, is_up_to_date, new_folder, read_config
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.safetensors_writer import Header, Shard, ShardWriter
from megatron_sfr.storage.provenance import contents_of


@dataclass(frozen=True)
class AdapterReport:
    """What was written: from or to which checkpoint, the number of matrices, their bytes, rank and scale."""

    output: Path
    checkpoint: Path
    tensors: int
    bytes: int
    rank: int
    alpha: float
    targets: str
    """lora_targets of a run with these adapters."""
    up_to_date: bool
    """Whether the same conversion had already written the output."""


def export_adapter(
    checkpoint: str | Path,
    output: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> AdapterReport:
    """Writes the adapters of a run with LoRA as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        checkpoint: a checkpoint, or a --save folder, of which the newest complete checkpoint is taken.
        output: folder to write.
        like: the Hugging Face folder of the base model.
        dtype: of the matrices. Default: the checkpoint's.
        force: replace an output of another export.
    Raises:
        ValueError: the checkpoint has no adapters, belongs to another architecture, or adapts experts.
    """
    output, like = Path(output), Path(like)
    adapter = StoredAdapter(Checkpoint(find_checkpoint(Path(checkpoint))), read_config(like))
    if any(entry.expert is not None for entry in adapter.entries):
        raise ValueError(
            f"{adapter.checkpoint.folder} adapts experts, which transformers keeps in one tensor and PEFT does not "
            "adapt one by one: export with --merge"
        )
    headers, ranks = {}, {}
    for name, matrix, tensor in _matrices(adapter):
        headers[peft_folder.tensor_name(name, matrix)] = Header(tuple(tensor.shape), dtype or tensor.dtype)
        if matrix == "A":
            ranks[name] = len(tensor)
    size = sum(x.bytes for x in headers.values())
    inputs = {"checkpoint": contents_of(adapter.checkpoint.folder), "like": contents_of(like, (CONFIG,))}
    identity = {"command": "convert export --adapter", **inputs, "options": {"dtype": str(dtype)}}
    if not (done := is_up_to_date(output, identity, force=force)):
        dropout = float(adapter.checkpoint.arguments().get("lora_dropout", 0.0))
        config = peft_folder.config_of(adapter.rank, adapter.alpha, dropout, str(like), ranks)
        with new_folder(output, force=force, size=size, identity=identity) as folder:
            peft_folder.write_config(folder, config)
            with ShardWriter(folder, Shard(peft_folder.WEIGHTS, headers)) as writer:
                for name, matrix, tensor in _matrices(adapter):
                    key = peft_folder.tensor_name(name, matrix)
                    writer.write(key, tensor.to(headers[key].dtype))
    targets = str(adapter.checkpoint.arguments()["lora_targets"])
    return AdapterReport(
        output, adapter.checkpoint.folder, len(headers), size, adapter.rank, adapter.alpha, targets, done
    )


def _matrices(adapter: StoredAdapter) -> Iterator[tuple[str, str, Tensor]]:
    """(HF weight, "A" or "B", the matrix), each read when it is asked for."""
    for entry in adapter.entries:
        for name, pair in zip(entry.names, adapter.read(entry), strict=True):
            yield name, "A", pair.a
            yield name, "B", pair.b
