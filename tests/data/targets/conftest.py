"""Encoding processes that start at once."""

import multiprocessing
import warnings
from collections.abc import Iterator

import pytest

from megatron_sfr.data.targets import encoder_process


class Forks:
    """multiprocessing with processes that are forks."""

    @staticmethod
    def get_context(method: str) -> multiprocessing.context.BaseContext:
        assert method == "spawn"
        return multiprocessing.get_context("fork")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Encoding processes are forks of this one, which has imported the encoder's library: 0.2 s of CPU instead of 9.

    Spawned ones are tested in test_the_encoder_ends_with_the_trainer, by `identity`, and in tests/distributed.
    """
    import sentence_transformers  # noqa: F401

    monkeypatch.setattr(encoder_process, "multiprocessing", Forks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        yield
