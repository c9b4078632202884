"""Packs conversations of different lengths into sequences of one length, by first-fit decreasing (Johnson, 1973).

Which lengths share a sequence depends on the lengths alone, so every epoch has the same number of sequences, equally
full. Each epoch shuffles the order, and which conversation of a length is where. Under context parallelism a
conversation is padded, so that it has equal parts for the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedSequences:
    """Packed sequences: number i holds items[starts[i] : starts[i + 1]]. int64 [n] and [sequences + 1]."""

    items: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, sequence: int) -> np.ndarray:
        return self.items[self.starts[sequence] : self.starts[sequence + 1]]


def padding_multiple(context_parallel_size: int) -> int:
    """What the length of a packed conversation is raised to a multiple of: each of R ranks has two of its 2 R parts."""
    return 2 * context_parallel_size if context_parallel_size > 1 else 1


def padded_lengths(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths [n], each raised to a multiple."""
    return lengths + -lengths % multiple


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> PackedSequences:
    """Packs items 0 ... n - 1 into sequences whose lengths sum to at most `capacity`.

    Each item, the longest first, goes to the first sequence that has room for it. All items of one length are placed
    together: one sequence after another takes as many as fit, with the same result as placing them one by one. The
    cost is sequences x distinct lengths, in numpy.

    Raises:
        ValueError: an item is longer than `capacity`, or empty.
    """
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths of {lengths.min()} to {lengths.max()} do not all fit sequences of 1 to {capacity}")
    by_length = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    sequence_of, room = [], np.empty(0, np.int64)
    for length, count in zip(distinct[::-1], counts[::-1], strict=True):
        fit = room // length
        taken = np.clip(count - (np.cumsum(fit) - fit), 0, fit)
        left = count - taken.sum()
        each = capacity // length
        new = np.full(-(-left // each), each)
        new[-1:] -= -left % each
        taken = np.concatenate([taken, new])
        room = np.concatenate([room, np.full(len(new), capacity)]) - taken * length
        sequence_of.append(np.repeat(np.arange(len(taken)), taken))
    sequence = np.concatenate([np.empty(0, np.int64), *sequence_of])
    by_sequence = np.argsort(sequence, kind="stable")
    return PackedSequences(by_length[by_sequence], np.searchsorted(sequence[by_sequence], np.arange(len(room) + 1)))


def shuffle(packed: PackedSequences, lengths: np.ndarray, rng: np.random.Generator) -> PackedSequences:
    """Shuffles the order of the sequences, and the items of each length among their positions, uniformly."""
    shuffled = rng.permutation(len(packed.items))
    items = np.empty_like(packed.items)
    items[np.argsort(lengths[packed.items], kind="stable")] = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    order = rng.permutation(len(packed))
    sizes = np.diff(packed.starts)[order]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    source = np.repeat(packed.starts[:-1][order] - starts[:-1], sizes) + np.arange(len(items))
    return PackedSequences(items[source], starts)


def most_in_a_sequence(counts: np.ndarray, lengths: np.ndarray, capacity: int) -> int:
    """An upper bound on the sum of counts [n] in a sequence, for any packing of items of these lengths [n].

    It is the bound of the fractional knapsack (Dantzig, 1957): the densest items first, the last one cut.
    """
    order = np.argsort(-counts / lengths, kind="stable")
    filled = np.cumsum(lengths[order])
    whole = int(np.searchsorted(filled, capacity, side="right"))
    total = int(counts[order[:whole]].sum())
    if whole == len(order):
        return total
    left = capacity - (int(filled[whole - 1]) if whole else 0)
    return total + int(counts[order[whole]] * left // lengths[order[whole]])
