"""How many sequences and steps an epoch of the training data is, read from prepared folders without Megatron.

`train_epochs` is turned into upstream's `train_iters` here, before upstream's arguments exist. An epoch of several
folders has as many sequences as all of them together; with weights a folder is read more or less often than once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.prepared.corpus_files import open_corpus
from megatron_sfr.data.prepared.documents import PreparedDocuments
from megatron_sfr.data.prepared.open import holds_documents, open_prepared
from megatron_sfr.storage.user_files import positive_integer
from megatron_sfr.training.data.packing import first_fit_decreasing, padded_lengths, padding_multiple

SPLIT = "969,30,1"
"""Upstream's default of `split`, which divides data_path into training, validation and test."""


@dataclass(frozen=True)
class Epoch:
    """An epoch of the training data."""

    sequences: dict[Path, int]
    """Sequences of each folder."""
    weights: tuple[float, ...] | None
    """Weights of the folders in a blend; None: by their numbers of sequences."""

    @property
    def total(self) -> int:
        """Sequences of all folders."""
        return sum(self.sequences.values())

    def times(self, samples: int) -> dict[Path, float]:
        """How often each folder is read in a run of this many sequences."""
        weights = self.weights or tuple(self.sequences.values())
        shares = [samples * weight / sum(weights) for weight in weights]
        return {path: share / n for (path, n), share in zip(self.sequences.items(), shares, strict=True)}


def read_epoch(options: Mapping[str, Any]) -> Epoch | None:
    """The epoch of a run with these arguments or recipe keys; None if its data are not named by path.

    Raises:
        ValueError: a folder is not a prepared folder, its training part is empty, or weights or `split` divide nothing.
    """
    blend = options.get("train_data_path") or options.get("data_path")
    if not blend:
        return None
    paths, weights = split_blend([blend] if isinstance(blend, str) else blend)
    if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"the training data have the weights {shown}: give numbers of at least 0, not all 0")
    share = 1.0 if options.get("train_data_path") else _training_share(str(options.get("split") or SPLIT))
    packed = options.get("sfr_packing") not in (None, "none")
    multiple = padding_multiple(positive_integer("context_parallel_size", options.get("context_parallel_size") or 1))
    length = positive_integer("seq_length", options.get("seq_length"))
    if length % multiple:
        raise ValueError(f"seq_length = {length}: set a multiple of {multiple}, twice context_parallel_size")
    sequences = {path: sequences_of(path, length, packed=packed, multiple=multiple, share=(0, share)) for path in paths}
    if empty := [path for path, n in sequences.items() if not n]:
        raise ValueError(f"{empty[0]} has no sequence of {options['seq_length']} tokens to train on; add data to it")
    return Epoch(sequences, weights)


def reorders_documents(options: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether a run that resumes reads its documents in another order because of its length. Takes two runs' arguments.

    Megatron shuffles the last epoch apart and the others together. A run within one epoch keeps its order.
    """
    lengths = {_sequences_read(options, earlier), _sequences_read(earlier, {})}
    blend = options.get("train_data_path") or options.get("data_path") or []
    if len(lengths) == 1 or not any(map(holds_documents, split_blend(blend)[0])):
        return False
    epoch = read_epoch(options)
    return epoch is not None and max(epoch.times(max(lengths)).values()) > 1


def _sequences_read(options: Mapping[str, Any], earlier: Mapping[str, Any]) -> int:
    """The sequences that a run asks Megatron for, with those that an earlier part of it has read."""
    if options.get("train_samples"):
        return int(options["train_samples"])
    steps, size = options.get("train_iters") or 0, options.get("global_batch_size") or 0
    consumed = earlier.get("consumed_train_samples") or 0
    step = consumed // (earlier.get("global_batch_size") or 1)
    return int(max(steps * size, consumed + (steps - step) * size))


def split_blend(blend: Sequence[Any]) -> tuple[list[Path], tuple[float, ...] | None]:
    """Paths and weights of a blend as upstream reads it: WEIGHT PATH WEIGHT PATH ..., or paths alone."""
    try:
        weights = tuple(float(weight) for weight in blend[::2])
    except ValueError:
        return [Path(path) for path in blend], None
    if len(blend) % 2:
        return [Path(path) for path in blend], None
    return [Path(path) for path in blend[1::2]], weights


def sequences_of(
    folder: Path,
    seq_length: int,
    *,
    packed: bool = False,
    multiple: int = 1,
    share: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Sequences that a part of a prepared folder is, in one epoch.

    packed: whether conversations share sequences, each padded to a `multiple`. share: where the part begins and ends.
    """
    data = open_prepared(folder)
    part = slice(*(round(bound * len(data)) for bound in share))
    if isinstance(data, PreparedData):
        lengths = data.positions[part]
        return len(first_fit_decreasing(padded_lengths(lengths, multiple), seq_length)) if packed else len(lengths)
    return max(0, (_tokens(data, part) - 1) // seq_length)  # upstream joins documents, and predicts all but one token


def _tokens(data: PreparedDocuments, part: slice) -> int:
    if part == slice(0, len(data)):
        return data.manifest.tokens
    return int(open_corpus(data.corpus).sequence_lengths[part].sum(dtype=np.int64))


def _training_share(split: str) -> float:
    """The training part of `split`, read as upstream reads it: up to three numbers with anything between them."""
    try:
        parts = [float(part) for part in re.findall(r"[.0-9]+", split)]
    except ValueError:  # 1.2.3
        parts = []
    if not sum(parts) or len(parts) > 3:
        raise ValueError(f"split = {split}: give the shares of training, validation and test, such as {SPLIT}")
    return parts[0] / sum(parts)


def train_iters_of(options: Mapping[str, Any]) -> int | None:
    """The steps that `train_epochs` asks for; None without it. Takes arguments or recipe keys.

    Raises:
        ValueError: the option cannot be combined with others, or the data cannot be read.
    """
    if (value := options.get("train_epochs")) is None:
        return None
    try:
        epochs, size = float(value), int(options.get("global_batch_size") or 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train_epochs = {value}: give a number above 0, and global_batch_size") from error
    if not 0 < epochs < math.inf:
        raise ValueError(f"train_epochs = {value}: give a number above 0")
    if options.get("train_samples") or options.get("rampup_batch_size"):
        raise ValueError("train_epochs cannot be combined with train_samples or rampup_batch_size: leave one out")
    if not size:
        raise ValueError("train_epochs needs global_batch_size, to know the steps of an epoch: set it")
    epoch = read_epoch(options)
    if epoch is None:
        raise ValueError("train_epochs needs the training data by path: set train_data_path")
    steps = math.ceil(epochs * epoch.total / size - 1e-9)
    given = options.get("train_iters")
    if given is not None and int(given) != steps:
        raise ValueError(f"train_epochs = {epochs:g} is {steps:,} steps of this data, train_iters = {given}: set one")
    return steps


def describe(options: Mapping[str, Any]) -> str | None:
    """A line about the epochs of a run with these arguments; None if its data or its length are not known."""
    size, steps = options.get("global_batch_size"), options.get("train_iters")
    epoch = read_epoch(options) if size else None
    if epoch is None or not size:
        return None
    line = f"an epoch is {epoch.total / size:,.1f} steps ({epoch.total:,} sequences)"
    if not steps:
        return line
    line += f", the run {steps * size / epoch.total:,.2f} epochs"
    if epoch.weights is not None:
        line += ": " + ", ".join(f"{path} {times:,.2f} times" for path, times in epoch.times(steps * size).items())
    return line
