"""Reads and writes Megatron's torch_dist checkpoints in one process, without a process group and without the model.

The format is torch.distributed.checkpoint's: chunks of named tensors in .distcp files, a `.metadata` with the position
of each chunk, and Megatron's `metadata.json`, written last. It is independent of the layout.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_sfr.hf.megatron.inert_pickle import HINT
from megatron_sfr.hf.megatron.safe_unpickle import read_common_state, read_metadata
from megatron_sfr.hf.megatron.stored_chunks import Piece, StoredChunks
from megatron_sfr.hf.megatron.tracker import CONFIG, METADATA, locate
from megatron_sfr.storage.user_files import cut, loading, read_json_object

COMMON = "common_state/shard_0_1"
"""Megatron-core's file for everything that is not a tensor: arguments, iteration, versions."""
FLAGS = "model_flags"
"""In an import's common state: Megatron's flags for the model."""
CHUNK_BYTES = 128 << 20
"""Size of the chunks that we write. Readers load complete chunks, so small ones keep a rank's reads near its part."""


def find_checkpoint(path: Path) -> Path:
    """The folder of one complete checkpoint, given that folder or a --save folder, whose newest one is used.

    If the tracker of a --save folder is damaged or names an incomplete checkpoint, the newest complete one is used,
    with a warning.
    """
    found = locate(path)
    if found.note:
        logging.getLogger(__name__).warning("warning: %s", found.note)
    folder = found.folder
    if any(folder.glob("mp_rank_*")):
        raise ValueError(f"{folder}: saved with --ckpt-format torch; load and save it with --ckpt-format torch_dist")
    backend = read_json_object(folder / CONFIG).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(f"{folder}: its format is {cut(str(backend))}; only torch_dist is read")
    return folder


class Checkpoint:
    """A checkpoint open for reading: `tensors` lists its tensors; `read` and `pieces` give any chunk of one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / METADATA)
        with loading(f"{folder / METADATA} is damaged", HINT):
            stored = self._metadata.state_dict_metadata
            self.tensors = {k: v for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
            self.objects = frozenset(k for k, v in stored.items() if isinstance(v, BytesStorageMetadata))
            self._chunks = StoredChunks(folder, self._metadata)
            ends = _file_ends(self._metadata)
        for name, end in ends.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                raise ValueError(f"{path} has {size} of {end} bytes: the checkpoint is not complete; {HINT}")

    def read(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The chunk of that size at that offset. Reads nothing else."""
        with loading(f"{self.folder}: {key} cannot be read", HINT):
            return self._chunks.read(key, offset, size)

    def pieces(self, key: str, offset: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> Iterator[Piece]:
        """The same chunk, in a dtype, as consecutive pieces: ranges of the checkpoint's files, or small tensors."""
        with loading(f"{self.folder}: {key} cannot be read", HINT):
            yield from self._chunks.pieces(key, offset, size, dtype)

    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the run that wrote it, or LoRA's options of an imported adapter; empty if it has none."""
        return self._common()[0]

    def model_flags(self) -> Mapping[str, object]:
        """Megatron's flags for an imported model, as keys of a recipe; empty for a run's checkpoint."""
        return self._common()[1]

    def _common(self) -> tuple[dict[str, Any], dict[str, object]]:
        """Arguments and flags."""
        info = self._metadata.storage_data.get(MetadataIndex(COMMON))
        if info is None:
            return {}, {}
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            stored = BytesIO(file.read(info.length))
        path = self.folder / info.relative_path
        with loading(f"{path}: the run's arguments cannot be read", HINT):
            common = read_common_state(stored)
            arguments = vars(common["args"]) if "args" in common else dict(common.get("lora", {}))
            return arguments, dict(common.get(FLAGS, {}))


def _file_ends(metadata: Metadata) -> dict[str, int]:
    """The minimum size in bytes of each file of a checkpoint."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


@dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor to write. `make` computes it when it is written."""

    key: str
    whole: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    size: tuple[int, ...]
    make: Callable[[], Tensor]


def write_checkpoint(folder: Path, chunks: Iterable[Chunk], objects: Mapping[str, Any]) -> None:
    """Writes one torch_dist checkpoint. Tensors are made, written and freed one by one."""
    planner = _Stream(tuple(chunks), objects)
    # per_thread_copy_ahead = 0: otherwise a machine with CUDA copies ahead and holds more than one tensor.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    try:
        written = writer.write_data(plan, planner).wait()
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):  # a full disk, which torch.save 2.13 hides behind its own error
            raise e.__context__ from e
        raise
    writer.finish(metadata, [written])
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class _Stream(DefaultSavePlanner):
    """Plans the writing of chunks, and computes each when the writer requests it."""

    def __init__(self, chunks: tuple[Chunk, ...], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(x.key, x.offset): x for x in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        tensors = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(x.offset), torch.Size(x.size)),
                    TensorProperties(dtype=x.dtype),
                    torch.Size(x.whole),
                ),
            )
            for index, x in self._chunks.items()
        ]
        self.plan = SavePlan([*(WriteItem(MetadataIndex(k), WriteItemType.BYTE_IO) for k in self._objects), *tensors])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        if write_item.type == WriteItemType.SHARD:
            chunk = self._chunks[write_item.index]
            tensor = chunk.make()
            assert tensor.shape == torch.Size(chunk.size), f"{chunk.key}: {tuple(tensor.shape)} is not {chunk.size}"
            return tensor.contiguous()
        stream = BytesIO()
        torch.save([self._objects[write_item.index.fqn]], stream)  # a list, as upstream stores its ShardedObjects
        return stream
