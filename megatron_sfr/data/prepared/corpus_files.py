"""Reads Megatron's indexed datasets, PREFIX.bin and PREFIX.idx, with checks, and writes the index of a new one.

The format is that of megatron-core 0.19.2, which is not imported: `prepare-text` and its workers need nothing else of
it. The .bin holds tokens; the .idx their dtype, the length and byte offset of each sequence, and the documents.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import numpy as np

from megatron_sfr.storage.arrays import map_flat

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the tokens' dtype, number of sequences, number of document boundaries."""
MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CHUNK = 1 << 22
"""Index entries that are checked at a time."""
HINT = "build the corpus again with Megatron's tools/preprocess_data.py"


class Corpus:
    """An indexed dataset, memory-mapped: `corpus[i]` is the tokens of sequence i.

    Raises:
        ValueError: the .idx is incomplete, or its sequences do not fit into the .bin. Upstream's reader trusts the
            file: with a damaged one it fails late or reads other memory.
    """

    def __init__(self, prefix: str) -> None:
        bin_path, path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        if not (bin_path.is_file() and path.is_file()):
            raise ValueError(f"{prefix}.bin or {prefix}.idx is missing; give the path without its extension")
        data = map_flat(path, np.uint8)
        if len(data) < HEADER.size:
            raise ValueError(f"{path} is damaged: it has {len(data)} bytes; {HINT}")
        magic, version, code, sequences, documents = HEADER.unpack(data[: HEADER.size].tobytes())
        size = HEADER.size + 12 * sequences + 8 * documents
        if magic != MAGIC or version != VERSION or code not in DTYPES or size > len(data):
            raise ValueError(f"{path} is damaged: its header does not describe a file of {len(data):,} bytes; {HINT}")
        self.dtype = np.dtype(DTYPES[code])
        lengths, starts, ends = (
            data[begin : begin + dtype.itemsize * count].view(dtype)
            for begin, count, dtype in (
                (HEADER.size, sequences, np.dtype(np.int32)),
                (HEADER.size + 4 * sequences, sequences, np.dtype(np.int64)),
                (HEADER.size + 12 * sequences, documents, np.dtype(np.int64)),
            )
        )
        self.sequence_lengths = lengths
        """int32 [sequences], in tokens."""
        self._starts = starts
        self._tokens = map_flat(bin_path, np.uint8)
        for first in range(0, max(sequences, documents), CHUNK):
            part = slice(first, first + CHUNK)
            length, start = lengths[part].astype(np.int64), starts[part]
            inside = (length >= 0) & (start >= 0) & (start <= len(self._tokens) - length * self.dtype.itemsize)
            if not inside.all() or ((ends[part] < 0) | (ends[part] > sequences)).any():
                raise ValueError(
                    f"{path} is damaged, or does not belong to the .bin of {len(self._tokens):,} bytes; {HINT}"
                )

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        start = int(self._starts[sequence])
        end = start + int(self.sequence_lengths[sequence]) * self.dtype.itemsize
        return self._tokens[start:end].view(self.dtype)


@cache
def open_corpus(prefix: str) -> Corpus:
    """The corpus of PREFIX.bin and PREFIX.idx, opened and checked once in a process."""
    return Corpus(prefix)


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype in which upstream stores the tokens of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    """Writes the .idx of a .bin that holds documents in order, each a sequence; lengths int32 [documents]."""
    code = next(code for code, known in DTYPES.items() if known is dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).tobytes())
        file.write(np.concatenate([[0], ends])[:-1].astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
