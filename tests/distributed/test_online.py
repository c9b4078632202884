"""Targets that are encoded while the model trains change no bit of what a run with stored targets learns."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.store import TargetStore

from .launch import read_checkpoint, read_metrics
from .settings import ITS_TWIN, ONLINE, ONLINE_STOPPED

pytestmark = pytest.mark.distributed
PAIRS = {name: twin for runs in ONLINE.values() for name, (twin, _) in runs.items()} | {ONLINE_STOPPED: ITS_TWIN}


@pytest.mark.parametrize("name", PAIRS)
def test_online_targets_change_no_bit(runs: Path, name: str) -> None:
    """Two replicas that fill one store; tensor, pipeline and sequence parallel; and no lookahead, stopped halfway."""
    expected, found = (read_metrics(runs / run) for run in (PAIRS[name], name))
    last = f"iter_{expected[-1]['step']:07d}"
    stored, online = (read_checkpoint(runs / run / last) for run in (PAIRS[name], name))
    assert stored.keys() == online.keys()
    assert [key for key in stored if not torch.equal(stored[key], online[key])] == []
    for row, row_found in zip(expected, found, strict=True):
        assert {key: row_found[key] for key in row if key != "time"} == {k: x for k, x in row.items() if k != "time"}


@pytest.mark.parametrize("name", PAIRS)
def test_the_wait_is_told_and_the_store_is_that_of_embed(runs: Path, name: str) -> None:
    rows = read_metrics(runs / name)
    assert all(row["target wait"] >= 0 for row in rows)
    assert rows[0]["target wait"] > 0, "the encoder was not even loaded"
    prepared = PreparedData.open(runs / "data" / "prepared")
    stored = TargetStore.open(prepared.folder / "targets", prepared)
    online = TargetStore.open(prepared.folder / name, prepared, partial=True)
    vectors, there = online.rows.read(torch.arange(len(online)).numpy())
    assert there.sum() > 100
    assert (vectors[there] == stored[there.nonzero()[0]]).all()
