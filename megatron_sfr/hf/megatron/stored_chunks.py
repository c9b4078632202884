"""Reads the tensors of a torch_dist checkpoint from its files, without loading complete chunks into memory.

torch stores each chunk as a zip archive, in which the bytes of its tensor are not compressed. The archive's directory
gives their position in the file, so a box of a tensor can be copied from there, or read to its final place.

A box is an offset and a size along each axis of a tensor.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_sfr.hf.megatron.file_ranges import FileRange, read_at, reading

PIECE_BYTES = 4 << 20
"""Size of the pieces in which tensors are assembled; they stay in a processor's cache."""
SMALL_BYTES = 1 << 16
"""Archives of at most this size are read at once: looking for the position of the values takes longer."""
Piece = FileRange | Tensor
"""Consecutive values of a tensor, in row-major order."""


@dataclass(frozen=True)
class Overlap:
    """What a box and a stored chunk have in common."""

    chunk: ChunkStorageMetadata
    in_chunk: tuple[int, ...]
    """Offset of the common part in the chunk."""
    in_box: tuple[int, ...]
    """Offset of the common part in the box."""
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The common part as an index of the box."""
        return tuple(slice(a, a + n) for a, n in zip(self.in_box, self.size, strict=True))

    @property
    def rows(self) -> tuple[int, int, tuple[int, ...]]:
        """The smallest contiguous part of the chunk that holds the common part: its first element, their number and
        its shape."""
        axis = row_axis(self.size)
        shape = (*self.size[: axis + 1], *self.chunk.sizes[axis + 1 :])
        strides = [prod(self.chunk.sizes[i + 1 :]) for i in range(axis + 1)]
        return sum(a * n for a, n in zip(self.in_chunk, strides, strict=False)), prod(shape), shape


def row_axis(size: Sequence[int]) -> int:
    """The first axis of more than one element, or the last."""
    return next((i for i, n in enumerate(size) if n > 1), max(len(size) - 1, 0))


class StoredChunks:
    """The chunks of a checkpoint's tensors. Files are opened for each access, so threads may share an object."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder, self._infos = folder, metadata.storage_data
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._stacks: dict[str, tuple[int, dict[tuple[int, ...], list[ChunkStorageMetadata]]]] = {}
        self._known: dict[MetadataIndex, FileRange | None] = {}

    def read(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of a tensor, read into one new tensor."""
        out = torch.empty(tuple(size), dtype=self._tensors[key].properties.dtype)
        overlaps = list(self._overlaps(key, offset, size))
        if sum(prod(x.size) for x in overlaps) != out.numel():
            raise ValueError(f"parts of {key} are not stored")
        for overlap in overlaps:
            self._read(key, overlap, out[overlap.slices])
        return out

    def pieces(self, key: str, offset: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> Iterator[Piece]:
        """The box of a tensor in consecutive pieces of a dtype.

        The pieces are ranges of the files if these store complete rows of the box in that dtype, else tensors of about
        PIECE_BYTES.
        """
        stored = self._tensors[key].properties.dtype
        if dtype == stored and (ranges := self._ranges(key, offset, size)) is not None:
            yield from ranges
            return
        axis = row_axis(size)
        step = max(1, PIECE_BYTES // (prod(size[axis + 1 :]) * stored.itemsize))
        for start in range(0, size[axis], step):
            at, n = list(offset), list(size)
            at[axis], n[axis] = offset[axis] + start, min(step, size[axis] - start)
            yield self.read(key, at, n).to(dtype)

    def _ranges(self, key: str, offset: Sequence[int], size: Sequence[int]) -> list[FileRange] | None:
        """The ranges of files that, concatenated, are a box; None if there are none."""
        axis, itemsize, ranges, filled = row_axis(size), self._tensors[key].properties.dtype.itemsize, [], 0
        for overlap in sorted(self._overlaps(key, offset, size), key=lambda x: x.in_box):
            raw, (first, count, shape) = self._raw(key, overlap.chunk), overlap.rows
            complete = shape[axis + 1 :] == overlap.size[axis + 1 :] == tuple(size[axis + 1 :])
            if raw is None or not complete or overlap.in_box[axis] != filled:
                return None
            ranges.append(FileRange(raw.path, raw.start + first * itemsize, count * itemsize))
            filled += overlap.size[axis]
        return ranges if filled == size[axis] else None

    def _overlaps(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Iterator[Overlap]:
        ends = [a + n for a, n in zip(offset, size, strict=True)]
        for chunk in self._candidates(key, offset, size):
            starts = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            stops = [min(e, b + n) for e, b, n in zip(ends, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(starts, stops, strict=True)):
                yield Overlap(
                    chunk,
                    tuple(a - b for a, b in zip(starts, chunk.offsets, strict=True)),
                    tuple(a - b for a, b in zip(starts, offset, strict=True)),
                    tuple(b - a for a, b in zip(starts, stops, strict=True)),
                )

    def _candidates(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Sequence[ChunkStorageMetadata]:
        """The chunks that may overlap a box: of a stack of layers or experts, those of the box's layer or expert."""
        chunks = self._tensors[key].chunks
        if key not in self._stacks:
            axes = min((row_axis(x.sizes) for x in chunks), default=0)
            found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                found.setdefault(tuple(chunk.offsets[:axes]), []).append(chunk)
            self._stacks[key] = axes, found
        axes, by_index = self._stacks[key]
        return by_index.get(tuple(offset[:axes]), ()) if all(n == 1 for n in size[:axes]) else chunks

    def _read(self, key: str, overlap: Overlap, out: Tensor) -> None:
        """Reads what a box and a chunk have in common into `out`, that part of the box."""
        small = self._infos[MetadataIndex(key, overlap.chunk.offsets)].length <= SMALL_BYTES
        if small or (raw := self._raw(key, overlap.chunk)) is None:
            index = tuple(slice(a, a + n) for a, n in zip(overlap.in_chunk, overlap.size, strict=True))
            out.copy_(self._load(key, overlap.chunk, "cpu")[index])
            return
        first, _, shape = overlap.rows
        position, axis = raw.start + first * out.itemsize, row_axis(overlap.size)
        inner = zip(overlap.in_chunk[axis + 1 :], overlap.size[axis + 1 :], strict=True)
        columns = (*(slice(None) for _ in range(axis + 1)), *(slice(a, a + n) for a, n in inner))
        with reading(raw.path) as source:
            if shape == overlap.size and out.is_contiguous():
                read_at(source, as_bytes(out), position, raw.path)
                return
            step = max(1, PIECE_BYTES // (prod(shape[axis + 1 :]) * out.itemsize))
            for start in range(0, shape[axis], step):
                part = out.narrow(axis, start, min(step, shape[axis] - start))
                rows = torch.empty((*part.shape[: axis + 1], *shape[axis + 1 :]), dtype=out.dtype)
                read_at(source, as_bytes(rows), position, raw.path)
                part.copy_(rows[columns])
                position += rows.nbytes

    def _raw(self, key: str, chunk: ChunkStorageMetadata) -> FileRange | None:
        """Where the bytes of a chunk are, row by row; None if they are stored in another way."""
        index = MetadataIndex(key, chunk.offsets)
        if index not in self._known:
            self._known[index] = self._find(key, chunk)
        return self._known[index]

    def _find(self, key: str, chunk: ChunkStorageMetadata) -> FileRange | None:
        info = self._infos[MetadataIndex(key, chunk.offsets)]
        try:
            with self._archive(info) as file, ZipFile(file) as archive:
                orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
        except BadZipFile:
            return None  # torch's format from before 1.6
        if orders != [sys.byteorder.encode()]:  # torch 2.13.0 crashes when it loads another order to "meta"
            return None
        tensor = self._load(key, chunk, "meta")
        storage, skipped = tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize
        start = storage._checkpoint_offset + skipped  # an attribute that torch documents for this purpose
        if not tensor.is_contiguous():
            return None
        if start + tensor.nbytes > info.length or skipped + tensor.nbytes > storage.nbytes():
            raise ValueError(f"a chunk of {key} is longer than its archive")
        return FileRange(self._folder / info.relative_path, info.offset + start, tensor.nbytes)

    def _load(self, key: str, chunk: ChunkStorageMetadata, device: str) -> Any:
        """The tensor of a chunk; on the device "meta" without its data."""
        info = self._infos[MetadataIndex(key, chunk.offsets)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{key} is stored through {', '.join(info.transform_descriptors)}, which is not read")
        with self._archive(info) as file:
            tensor = torch.load(file, map_location=device, weights_only=True)
        expected = chunk.sizes, self._tensors[key].properties.dtype
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != expected:
            raise ValueError(f"a chunk of {key} is not {list(chunk.sizes)} of {expected[1]}, as the metadata says")
        return tensor

    @contextmanager
    def _archive(self, info: Any) -> Iterator[IO[bytes]]:
        """The archive of a chunk."""
        with (self._folder / info.relative_path).open("rb") as file:
            part = part_of(file, info.offset, info.length)
            yield io.BytesIO(part.read()) if info.length <= SMALL_BYTES else part


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def part_of(file: IO[bytes], start: int, length: int) -> io.BufferedReader:
    """Consecutive bytes of a file, as a file."""
    return io.BufferedReader(_Part(file, start, length))


class _Part(io.RawIOBase):
    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count: int = self._file.readinto(part)  # type: ignore[attr-defined]
        self._position += count
        return count
