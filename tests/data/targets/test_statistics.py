"""Statistics of embeddings read in blocks, and of several stores as if they were one, against numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.data.targets.statistics import pooled, pooled_statistics, statistics_of


class Store(SimpleNamespace):
    """Rows with the statistics that a store keeps of them."""

    def __len__(self) -> int:
        return self.rows


def rows_of(seed: int, rows: int, mean: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, 5)) * [1, 1e-3, 0.1, 30, 0] + mean).astype(np.float16)


ROWS = st.builds(rows_of, st.integers(0, 99), st.integers(1, 60), st.sampled_from([0.0, 1.0, 500.0]))


@given(ROWS, st.integers(1, 70))
def test_blocks_equal_numpy_on_all_embeddings(vectors: np.ndarray, block_rows: int):
    found, exact = statistics_of(vectors, block_rows), vectors.astype(np.float64)

    assert found.rows == len(vectors)
    assert found.mean.dtype == found.std.dtype == np.float64
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.std, exact.std(axis=0), rtol=1e-12, atol=1e-12)


@given(st.lists(ROWS, min_size=1, max_size=5))
def test_parts_together_are_what_numpy_gives_on_the_concatenation(parts: list[np.ndarray]):
    found, exact = pooled([statistics_of(part) for part in parts]), np.concatenate(parts).astype(np.float64)

    assert found.rows == len(exact)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.std, exact.std(axis=0), rtol=1e-12, atol=1e-12)

    stores = []
    for part in map(statistics_of, parts):
        stores.append(Store(rows=part.rows, mean=part.mean.astype(np.float32), std=part.std.astype(np.float32)))
    mean, std = pooled_statistics(stores)
    assert mean.dtype == std.dtype == np.float32
    # Stores keep fp32, so a mean of 500 is known to 3e-5, and a spread between stores no better.
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(std, exact.std(axis=0), rtol=1e-6, atol=1e-4)


def test_one_store_keeps_its_statistics_bit_for_bit():
    part = statistics_of(rows_of(3, 40))
    store = Store(rows=part.rows, mean=part.mean.astype(np.float32), std=part.std.astype(np.float32))
    mean, std = pooled_statistics([store])

    assert (mean == store.mean).all()
    assert (std == store.std).all()


def test_stores_of_different_dimensions_are_refused():
    stores = [Store(rows=2, mean=np.zeros(d, np.float32), std=np.ones(d, np.float32)) for d in (4, 3)]

    with pytest.raises(ValueError, match=r"dimensions \[3, 4\] cannot be combined"):
        pooled_statistics(stores)
