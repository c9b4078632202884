"""Writes safetensors files piece by piece. All sizes are known in advance, so no file is held in memory."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_sfr.hf.hf_folder import DTYPES, SINGLE
from megatron_sfr.hf.megatron.file_ranges import FileRange, write_at
from megatron_sfr.hf.megatron.stored_chunks import Piece, as_bytes

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file and its tensors."""

    file: str
    tensors: Mapping[str, Header]


def plan_shards(tensors: Mapping[str, Header], shard_bytes: int) -> list[Shard]:
    """Files of at most shard_bytes, in the order of the tensors. A larger tensor gets a separate file."""
    shards: list[dict[str, Header]] = []
    filled = 0
    for name, header in tensors.items():
        if not shards or (filled and filled + header.bytes > shard_bytes):
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += header.bytes
    if len(shards) == 1:
        return [Shard(SINGLE, shards[0])]
    return [Shard(f"model-{i:05d}-of-{len(shards):05d}.safetensors", x) for i, x in enumerate(shards, 1)]


class ShardWriter:
    """A shard's file, open for writing its tensors in any order.

    The format is: length of the header (8 bytes), the header as JSON, the tensors' bytes. Wider dtypes come first, so
    that each tensor is aligned.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._shard = shard
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in sorted(shard.tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            self._offsets[name], start = end, end
            end += tensor.bytes
            header[name] = {"dtype": KINDS[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = (folder / shard.file).open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()
        assert kind is not None or not self._offsets, f"{self._shard.file}: not written: {', '.join(self._offsets)}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the shard's tensors, once."""
        assert tuple(tensor.shape) == self._shard.tensors[name].shape, name
        self.write_pieces(name, [tensor.contiguous()])

    def write_pieces(self, name: str, pieces: Iterable[Piece]) -> None:
        """Writes one of the shard's tensors, once, from consecutive pieces of it."""
        header = self._shard.tensors[name]
        position = start = self._start + self._offsets.pop(name)
        for piece in pieces:
            if isinstance(piece, FileRange):
                piece.copy_to(self._file.fileno(), position)
                position += piece.bytes
            else:
                assert piece.dtype == header.dtype, f"{name}: {piece.dtype} is not {header.dtype}"
                write_at(self._file.fileno(), as_bytes(piece), position)
                position += piece.nbytes
        assert position - start == header.bytes, f"{name}: {position - start} bytes are not {header.bytes}"
        # Starts writing the range to the disk, which the flush at the end then waits for. Dirty pages are not dropped.
        os.posix_fadvise(self._file.fileno(), start, header.bytes, os.POSIX_FADV_DONTNEED)
