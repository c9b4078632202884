"""The examples in the docstrings of the functions for other training loops."""

import doctest
from types import ModuleType

import pytest

from megatron_sfr.model import attach_head
from megatron_sfr.training import bridge


@pytest.mark.parametrize("module", [attach_head, bridge])
def test_the_example_of_the_docstring_runs(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0
