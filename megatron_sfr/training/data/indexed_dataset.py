"""Upstream's indexed datasets (.bin, .idx) outside of training: opening one, and writing the index of a new one."""

import struct
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 22  # index entries that are checked at a time
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Bytes of a token by megatron-core 0.19.2's DType code."""


@cache
def _upstream() -> Any:
    """Upstream's module, imported on first use, so that workers that only tokenize start quickly."""
    with warnings.catch_warnings():  # Transformer Engine and Apex are not needed here
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@cache
def open_corpus(prefix: str) -> Any:
    """The IndexedDataset of PREFIX.bin and PREFIX.idx; ValueError if either is missing."""
    if not _upstream().IndexedDataset.exists(prefix):
        raise ValueError(f"{prefix}.bin or {prefix}.idx is missing; give the path without its extension")
    check_index(Path(f"{prefix}.idx"), Path(f"{prefix}.bin").stat().st_size)
    return _upstream().IndexedDataset(prefix)


def check_index(path: Path, tokens_bytes: int) -> None:
    """Raises ValueError unless a .idx is complete and its documents fit into a .bin of `tokens_bytes` bytes.

    Upstream's reader trusts the file: with a damaged one it fails late or reads other memory.
    """
    hint = "build the corpus again with Megatron's tools/preprocess_data.py"
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    fields = struct.Struct("<9sQBQQ")
    if len(data) < fields.size:
        raise ValueError(f"{path} is damaged: it has {len(data)} bytes; {hint}")
    magic, version, code, sequences, documents = fields.unpack(data[: fields.size].tobytes())
    size = fields.size + 12 * sequences + 8 * documents
    if magic != b"MMIDIDX\0\0" or version != 1 or code not in _ITEM_BYTES or size > len(data):
        raise ValueError(f"{path} is damaged: its header does not describe a file of {len(data):,} bytes; {hint}")
    lengths, starts, ends = (
        data[begin : begin + dtype.itemsize * count].view(dtype)
        for begin, count, dtype in (
            (fields.size, sequences, np.dtype(np.int32)),
            (fields.size + 4 * sequences, sequences, np.dtype(np.int64)),
            (fields.size + 12 * sequences, documents, np.dtype(np.int64)),
        )
    )
    for first in range(0, max(sequences, documents), CHUNK):
        part = slice(first, first + CHUNK)
        length = lengths[part].astype(np.int64)
        inside = (length >= 0) & (starts[part] >= 0) & (starts[part] <= tokens_bytes - length * _ITEM_BYTES[code])
        if not inside.all() or ((ends[part] < 0) | (ends[part] > sequences)).any():
            raise ValueError(f"{path} is damaged, or does not belong to the .bin of {tokens_bytes:,} bytes; {hint}")


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype in which upstream stores tokens of a vocabulary of this size."""
    return _upstream().DType.optimal_dtype(vocab_size)


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    """Writes the .idx of a .bin that holds the documents' tokens in order; lengths int32 [documents]."""
    with _upstream()._IndexWriter(str(path), dtype) as index:
        index.write(lengths, None, np.arange(len(lengths) + 1))
