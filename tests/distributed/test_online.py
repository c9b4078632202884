"""Targets that are encoded while the model trains change no bit of what a run with stored targets learns."""

from pathlib import Path

import pytest
import torch

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import embed
from megatron_sfr.data.targets.store import TargetStore

from . import test_layouts, test_resume
from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import RATIO, TWO_CLIPS
from .test_layouts import LAYOUTS
from .tiny import BLOCKS

pytestmark = pytest.mark.distributed
NAMES = ("dp2", "tp2-pp2-sp", pytest.param("stopped", marks=pytest.mark.recovery))


def twin(runs: Runs, name: str) -> Path:
    """The run with stored targets."""
    return test_resume.straight(runs, "single") if name == "stopped" else test_layouts.trained(runs, name)


def trained(runs: Runs, name: str) -> Path:
    """As its twin, with targets that are encoded meanwhile, and validated; `stopped` has no lookahead and a stop."""
    store = f"online-{name}"
    later = {"later": True, "progress": False}
    runs.once(f"{store}.store", lambda _: embed(runs.prepared, "minilm", BLOCKS, output=runs.prepared / store, **later))
    online = ("--sfr-targets", "online", "--sfr-target-store", store)
    if name == "stopped":
        return runs.train(store, 1, *RATIO, *online, "--sfr-lookahead", "0", stops=(2, 4))
    ranks, layout = LAYOUTS[name]
    validation = ("--valid-data-path", str(runs.prepared), "--eval-iters", "1", "--eval-interval", "1")
    return runs.train(store, ranks, *runs.start(), *TWO_CLIPS, *layout, *online, *validation)


@pytest.mark.parametrize("name", NAMES)
def test_online_targets_change_no_bit(runs: Runs, name: str) -> None:
    """Two replicas that fill one store; tensor, pipeline and sequence parallel; and no lookahead, stopped halfway."""
    both = twin(runs, name), trained(runs, name)
    expected, found = map(read_metrics, both)
    last = f"iter_{expected[-1]['step']:07d}"
    stored, online = (read_checkpoint(run / last) for run in both)
    assert stored.keys() == online.keys()
    assert [key for key in stored if not torch.equal(stored[key], online[key])] == []
    for row, row_found in zip(expected, found, strict=True):
        assert {key: row_found[key] for key in row if key != "time"} == {k: x for k, x in row.items() if k != "time"}


@pytest.mark.parametrize("name", NAMES)
def test_the_wait_is_logged_and_the_store_is_that_of_embed(runs: Runs, name: str) -> None:
    rows = read_metrics(trained(runs, name))
    assert all(row["target wait"] >= 0 for row in rows)
    assert rows[0]["target wait"] > 0, "the encoder was not even loaded"
    prepared = PreparedData.open(runs.prepared)
    stored = TargetStore.open(prepared.folder / "targets", prepared)
    online = TargetStore.open(prepared.folder / f"online-{name}", prepared, partial=True)
    vectors, there = online.embeddings.read(torch.arange(len(online)).numpy())
    assert there.sum() > 50
    assert (vectors[there] == stored[there.nonzero()[0]]).all()
