"""Every registered token loss passes the common checks, in each of its settings for tests.

A new loss needs no change here: it is found by its name. Sharding is tested in test_shards.py, kernels in
tests/kernels, training on parallel layouts in tests/distributed/test_objectives.py; all read the same list.
"""

from collections.abc import Callable

import pytest

from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES
from tests.objectives.token.common_checks import CHECKS
from tests.objectives.token.token_cases import ALL_LOSSES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_loss(name: str, check: Callable[[TokenLoss], None]) -> None:
    check(ALL_LOSSES[name])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_written_definition_and_a_setting_that_runs_it(name: str) -> None:
    registered = LOSSES[name]
    assert "loss" in vars(registered.loss), f"{name} inherits its definition from another loss"
    assert registered.instances(), f"{name} has no setting for tests"
    assert (registered.loss.__doc__ or "").strip()
