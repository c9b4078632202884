"""Upstream's indexed datasets (.bin, .idx) outside of training: opened to be prepared, and the index of a new one."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, _IndexWriter


@lru_cache(maxsize=4)
def open_corpus(prefix: str) -> IndexedDataset:
    """The documents of PREFIX.bin and PREFIX.idx; ValueError where they are not there."""
    if not IndexedDataset.exists(prefix):
        raise ValueError(f"{prefix}.bin and {prefix}.idx are not both there; give the path without its ending")
    return IndexedDataset(prefix)


def token_dtype(vocab_size: int) -> type[np.generic]:
    """What upstream stores the tokens of a vocabulary in."""
    return DType.optimal_dtype(vocab_size)


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    """The .idx of tokens that stand one document after another in a .bin; lengths int32 [documents]."""
    with _IndexWriter(str(path), dtype) as index:
        index.write(lengths, None, np.arange(len(lengths) + 1))
