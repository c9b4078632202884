"""Upstream's indexed datasets (.bin, .idx) outside of training: opened to be prepared, and the index of a new one."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def _upstream() -> Any:
    """Upstream's module, imported where it is used: a worker that only tokenizes does not wait for it."""
    with warnings.catch_warnings():  # that Transformer Engine and Apex are missing is no news here
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@cache
def open_corpus(prefix: str) -> Any:
    """The IndexedDataset of PREFIX.bin and PREFIX.idx; ValueError where they are not there."""
    if not _upstream().IndexedDataset.exists(prefix):
        raise ValueError(f"{prefix}.bin and {prefix}.idx are not both there; give the path without its ending")
    return _upstream().IndexedDataset(prefix)


def token_dtype(vocab_size: int) -> type[np.generic]:
    """What upstream stores the tokens of a vocabulary in."""
    return _upstream().DType.optimal_dtype(vocab_size)


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    """The .idx of tokens that stand one document after another in a .bin; lengths int32 [documents]."""
    with _upstream()._IndexWriter(str(path), dtype) as index:
        index.write(lengths, None, np.arange(len(lengths) + 1))
