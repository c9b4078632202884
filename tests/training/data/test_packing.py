"""First-fit decreasing against its definition, what an epoch deals, and the bound on what a row can hold."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.training.data.packing import deal, first_fit_decreasing, most_in_a_row

CAPACITY = 20
some_lengths = st.lists(st.integers(1, CAPACITY), max_size=40).map(lambda x: np.array(x, np.int64))


def first_fit_one_by_one(lengths: np.ndarray) -> list[list[int]]:
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in rows if sum(lengths[r]) + lengths[item] <= CAPACITY), None)
        if row is None:
            rows.append(row := [])
        row.append(item)
    return rows


@given(some_lengths)
def test_rows_are_those_of_first_fit_decreasing(lengths: np.ndarray):
    rows = first_fit_decreasing(lengths, CAPACITY)

    assert [list(rows[i]) for i in range(len(rows))] == first_fit_one_by_one(lengths)


@given(some_lengths, st.integers(0, 9))
def test_an_epoch_deals_each_item_once_into_rows_of_the_same_lengths(lengths: np.ndarray, seed: int):
    rows = first_fit_decreasing(lengths, CAPACITY)
    dealt = deal(rows, lengths, np.random.default_rng(seed))

    assert sorted(dealt.items) == list(range(len(lengths)))
    shapes = [sorted(tuple(lengths[r[i]]) for i in range(len(r))) for r in (rows, dealt)]
    assert shapes[0] == shapes[1]


def test_each_epoch_differs_and_a_seed_repeats():
    lengths = np.array([3, 3, 3, 3, 9, 9, 9, 9, 5, 5])
    rows = first_fit_decreasing(lengths, 12)
    epochs = [deal(rows, lengths, np.random.default_rng([7, epoch])) for epoch in (0, 1, 0)]

    partners = [{frozenset(map(int, epoch[i])) for i in range(len(epoch))} for epoch in epochs]
    assert partners[0] != partners[1]
    assert partners[0] == partners[2]


def test_every_item_is_equally_often_in_the_first_row():
    lengths = np.ones(4, np.int64)
    rows = first_fit_decreasing(lengths, 1)
    firsts = [deal(rows, lengths, np.random.default_rng(seed)).items[0] for seed in range(4000)]

    assert np.bincount(firsts, minlength=4) == pytest.approx(np.full(4, 1000), abs=150)


@pytest.mark.parametrize("lengths", [[3, CAPACITY + 1], [0, 3]])
def test_lengths_that_fit_no_row_are_refused(lengths: list[int]):
    with pytest.raises(ValueError, match="do not all fit rows"):
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

    assert best <= most_in_a_row(counts, lengths, CAPACITY)


def test_the_bound_is_met_where_the_densest_items_fill_a_row():
    assert most_in_a_row(np.array([2, 1, 5]), np.array([10, 10, 40]), 20) == 3
