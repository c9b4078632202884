"""The arrays of a sample's anchors against plain loops: positions, targets and weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.data.prepared.conversations import Anchors
from megatron_sfr.training.data.anchor_arrays import (
    AnchorSizes,
    EntryOptions,
    SequenceAnchors,
    anchor_arrays,
    entries_of_nearest,
    join_anchors,
)

HORIZONS, SAMPLE = 3, 41


def alone(anchors: Anchors) -> SequenceAnchors:
    """A sequence of one conversation."""
    return join_anchors([anchors], np.array([SAMPLE]), np.array([0]))


@st.composite
def samples(draw) -> Anchors:
    """Replies with an anchor at every stride; horizons may be missing."""
    rows, at = [], 0
    stride = draw(st.integers(1, 7))
    for response, length in enumerate(draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))):
        at += draw(st.integers(1, 5))
        for j in range(0, length, stride):
            for horizon in range(HORIZONS):
                if draw(st.booleans()):
                    rows.append((at + j - 1, draw(st.integers(0, 99)), response, j, length, horizon))
        at += length
    return Anchors(*np.array(rows, np.int32).reshape(-1, 6).T.copy())


def nearest_by_loops(anchors: Anchors) -> list[tuple[int, int]]:
    """Target row and ordinal of every entry, by the definition."""
    entries = []
    for response in np.unique(anchors.response):
        for horizon in range(HORIZONS):
            rows = np.flatnonzero((anchors.response == response) & (anchors.horizon == horizon))
            for j in range(anchors.length[rows[0]] if len(rows) else 0):
                nearest = min(rows, key=lambda row: (abs(anchors.ordinal[row] - j), anchors.ordinal[row]))
                entries.append((int(nearest), j))
    return entries


@given(samples())
def test_every_position_has_the_nearest_anchor_the_earlier_on_a_tie(anchors: Anchors):
    rows, ordinals = entries_of_nearest(anchors)

    assert list(zip(rows.tolist(), ordinals.tolist(), strict=True)) == nearest_by_loops(anchors)


def test_a_tie_goes_to_the_earlier_anchor():
    columns = np.array([[9, 0, 0, 0, 7, 0], [13, 1, 0, 4, 7, 0]], np.int32).T
    rows, ordinals = entries_of_nearest(Anchors(*columns))

    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert ordinals.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fill", ["anchors_only", "nearest"])
@given(anchors=samples(), spare=st.integers(0, 4))
def test_arrays_hold_position_target_and_weight_of_each_entry(fill: str, anchors: Anchors, spare: int):
    n = len(anchors.position)
    entries = nearest_by_loops(anchors) if fill == "nearest" else [(row, anchors.ordinal[row]) for row in range(n)]
    sizes = AnchorSizes(n + spare, len(entries) + spare)

    arrays = anchor_arrays(alone(anchors), EntryOptions(fill), sizes)

    types = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    assert types.pop("anchor_weight") == ("float32", (sizes.entries,))
    names = ("position", "row", "horizon", "sample", "place")
    assert types == {f"anchor_{name}": ("int64", (sizes.entries,)) for name in names}
    assert (arrays["anchor_sample"][: len(entries)] == SAMPLE).all()
    assert (arrays["anchor_place"] == arrays["anchor_position"]).all()
    for array in arrays.values():
        assert not array[len(entries) :].any()
    for i, (row, j) in enumerate(entries):
        assert arrays["anchor_row"][i] == row
        assert arrays["anchor_horizon"][i] == anchors.horizon[row]
        assert arrays["anchor_position"][i] == anchors.position[row] - anchors.ordinal[row] + j
    check_weights(arrays["anchor_weight"], anchors, entries)


def check_weights(weights: np.ndarray, anchors: Anchors, entries: list[tuple[int, int]]) -> None:
    """(N - j) / N, scaled to sum to N over all positions and horizons of a reply."""
    for response in np.unique(anchors.response):
        mine = [i for i, (row, _) in enumerate(entries) if anchors.response[row] == response]
        length = anchors.length[anchors.response == response][0]
        raw = np.array([(length - entries[i][1]) / length for i in mine])
        np.testing.assert_allclose(weights[mine], raw * length / raw.sum(), rtol=1e-6)
        assert weights[mine].sum() == pytest.approx(length, rel=1e-5)


def test_a_sample_without_anchors_is_all_padding():
    none = Anchors(*np.zeros((6, 0), np.int32))
    for fill in ("anchors_only", "nearest"):
        arrays = anchor_arrays(alone(none), EntryOptions(fill), AnchorSizes(2, 5))
        assert not any(array.any() for array in arrays.values())


@pytest.mark.parametrize("fill", ["anchors_only", "nearest"])
@given(parts=st.lists(samples(), min_size=1, max_size=3))
def test_a_packed_sequence_has_the_shifted_entries_of_its_conversations(fill: str, parts: list[Anchors]):
    n = sum(len(part.position) for part in parts)
    starts, numbers = 100 * np.arange(len(parts)), 7 + np.arange(len(parts))
    sizes = AnchorSizes(n, 99 * HORIZONS * len(parts))

    joined = anchor_arrays(join_anchors(parts, numbers, starts), EntryOptions(fill), sizes)

    at = row = 0
    for part, start, number in zip(parts, starts, numbers, strict=True):
        single = anchor_arrays(alone(part), EntryOptions(fill), sizes)
        used = slice(at, at + np.count_nonzero(single["anchor_weight"]))
        expected = {name: array[: used.stop - at] for name, array in single.items()}
        expected["anchor_row"] = expected["anchor_row"] + row
        expected["anchor_position"] = expected["anchor_position"] + start
        expected["anchor_sample"] = np.full(used.stop - at, number)
        for name, array in expected.items():
            assert (joined[name][used] == array).all(), name
        at, row = used.stop, row + len(part.position)
    assert not joined["anchor_weight"][at:].any()
