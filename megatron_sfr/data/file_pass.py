"""One pass over JSONL files by several workers with a progress bar: what is common to chats and documents."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_sfr.data.lines import CHUNK_BYTES, BadRow, Chunk, Place, read_chunks
from megatron_sfr.data.workers import ordered_map


class Encoded(Protocol):
    """What becomes of a chunk: where the next one begins, its bad rows, and the number of its good ones."""

    @property
    def end(self) -> Place: ...
    @property
    def bad(self) -> list[BadRow]: ...
    @property
    def samples(self) -> int: ...


@dataclass(frozen=True)
class PassOptions:
    """How files are gone through; none of it changes what becomes of them."""

    workers: int = 1
    chunk_bytes: int = CHUNK_BYTES
    skip_bad_rows: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"{self.workers} workers; give at least 1")


def encode_files[R: Encoded](
    inputs: Sequence[Path], encode: Callable[[Chunk], R], start: Place, options: PassOptions
) -> Generator[R]:
    """encode(chunk) for each chunk from `start` on, in order; `encode` is pickled for the workers.

    The first bad row is a ValueError `file:line: reason`, unless they are skipped. Close the iterator after an error.
    """
    from tqdm import tqdm

    sizes = [path.stat().st_size for path in inputs]
    total, before, rows = sum(sizes), _bytes_before(start, sizes), 0
    if before and options.progress:
        print(f"goes on at {inputs[start.file]}:{start.line}, where an earlier run was stopped")
    chunks = read_chunks(inputs, start, options.chunk_bytes)
    workers = min(options.workers, -(-(total - before) // options.chunk_bytes) or 1)
    with (
        tqdm(
            total=total, initial=before, desc="prepare", unit="B", unit_scale=True, disable=not options.progress
        ) as bar,
        closing(ordered_map(encode, chunks, workers)) as encoded,
    ):
        for chunk in encoded:
            if chunk.bad and not options.skip_bad_rows:
                raise ValueError(str(chunk.bad[0]))
            yield chunk
            rows += chunk.samples + len(chunk.bad)
            rate = rows / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rows:,} rows, {rate:,.0f} rows/s", refresh=False)
            bar.update(_bytes_before(chunk.end, sizes) - bar.n)


def _bytes_before(place: Place, sizes: Sequence[int]) -> int:
    return sum(sizes[: place.file]) + place.byte
