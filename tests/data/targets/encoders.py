"""Encoders for separate processes: the real one, which also keeps a log and can be told to be slow or to fail."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions, load_quietly
from megatron_sfr.data.targets.store import EncoderIdentity
from tests.data.stores import BLOCKS


class Logged:
    """`minilm`, with a line in `log` for each batch: how many texts it has."""

    def __init__(self, log: Path, seconds: float = 0.0, options: EncoderOptions = BLOCKS) -> None:
        self._log, self._seconds = log, seconds
        self._encoder: Encoder = load_quietly("minilm", options)

    @property
    def identity(self) -> EncoderIdentity:
        return self._encoder.identity

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        with open(self._log, "a") as file:
            file.write(f"{len(texts)}\n")
        time.sleep(self._seconds)
        return self._encoder.encode(texts)


class Failing(Logged):
    """Fails as a GPU does."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        raise RuntimeError("out of memory:\ntried to allocate 2 GiB")


def encoded_in(log: Path) -> int:
    """How many texts the encoders that write to this log were given."""
    return sum(map(int, log.read_text().split())) if log.exists() else 0
