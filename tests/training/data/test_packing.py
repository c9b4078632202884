"""First-fit decreasing against its definition, what an epoch shuffles, and the bound on what a sequence can hold."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.training.data.packing import first_fit_decreasing, most_in_a_sequence, shuffle

CAPACITY = 20
some_lengths = st.lists(st.integers(1, CAPACITY), max_size=40).map(lambda x: np.array(x, np.int64))


def first_fit_one_by_one(lengths: np.ndarray) -> list[list[int]]:
    packed: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        sequence = next((r for r in packed if sum(lengths[r]) + lengths[item] <= CAPACITY), None)
        if sequence is None:
            packed.append(sequence := [])
        sequence.append(item)
    return packed


@given(some_lengths)
def test_sequences_are_those_of_first_fit_decreasing(lengths: np.ndarray):
    packed = first_fit_decreasing(lengths, CAPACITY)

    assert [list(packed[i]) for i in range(len(packed))] == first_fit_one_by_one(lengths)


@given(some_lengths, st.integers(0, 9))
def test_an_epoch_has_each_item_once_in_sequences_of_the_same_lengths(lengths: np.ndarray, seed: int):
    packed = first_fit_decreasing(lengths, CAPACITY)
    shuffled = shuffle(packed, lengths, np.random.default_rng(seed))

    assert sorted(shuffled.items) == list(range(len(lengths)))
    shapes = [sorted(tuple(lengths[r[i]]) for i in range(len(r))) for r in (packed, shuffled)]
    assert shapes[0] == shapes[1]


def test_each_epoch_differs_and_a_seed_repeats():
    lengths = np.array([3, 3, 3, 3, 9, 9, 9, 9, 5, 5])
    packed = first_fit_decreasing(lengths, 12)
    epochs = [shuffle(packed, lengths, np.random.default_rng([7, epoch])) for epoch in (0, 1, 0)]

    partners = [{frozenset(map(int, epoch[i])) for i in range(len(epoch))} for epoch in epochs]
    assert partners[0] != partners[1]
    assert partners[0] == partners[2]


def test_every_item_is_equally_often_in_the_first_sequence():
    lengths = np.ones(4, np.int64)
    packed = first_fit_decreasing(lengths, 1)
    firsts = [shuffle(packed, lengths, np.random.default_rng(seed)).items[0] for seed in range(4000)]

    assert np.bincount(firsts, minlength=4) == pytest.approx(np.full(4, 1000), abs=150)


@pytest.mark.parametrize("lengths", [[3, CAPACITY + 1], [0, 3]])
def test_lengths_that_fit_no_sequence_are_refused(lengths: list[int]):
    with pytest.raises(ValueError, match="do not all fit sequences"):
        first_fit_decreasing(np.array(lengths), CAPACITY)


@given(st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, 9)), min_size=1, max_size=9))
def test_no_choice_of_items_exceeds_the_bound(items: list[tuple[int, int]]):
    lengths, counts = (np.array(column) for column in zip(*items, strict=True))
    best = max(
        int(counts[list(chosen)].sum())
        for size in range(len(items) + 1)
        for chosen in combinations(range(len(items)), size)
        if lengths[list(chosen)].sum() <= CAPACITY
    )

    assert best <= most_in_a_sequence(counts, lengths, CAPACITY)


def test_the_bound_is_met_where_the_densest_items_fill_a_sequence():
    assert most_in_a_sequence(np.array([2, 1, 5]), np.array([10, 10, 40]), 20) == 3
