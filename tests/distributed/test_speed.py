"""The speed of a real run, in its metrics and TensorBoard, and its status."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sfr.cli.training.status import read_status

from . import tiny
from .runs import Runs
from .settings import PP2

pytestmark = pytest.mark.distributed
NAMES = {
    *("step seconds", "tokens per second", "tokens per second per GPU", "TFLOPs per second per GPU"),
    *("data wait ms", "peak memory GB", "seconds left"),
}


def test_the_speed_is_logged_and_the_status_shows_it(runs: Runs) -> None:
    """Of two ranks, and on CPU without MFU."""
    save = runs.train("pp2-speed", 2, *PP2, "--log-interval", "2", "--train-iters", "4")
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    found = [{name.removeprefix("speed/") for name in record if name.startswith("speed/")} for record in records]
    assert found == [set(), NAMES, set(), NAMES]
    last = records[-1]
    assert last["speed/tokens per second"] == pytest.approx(4 * tiny.SEQ_LENGTH / last["speed/step seconds"])
    assert last["speed/tokens per second per GPU"] == last["speed/tokens per second"] / 2
    assert last["speed/TFLOPs per second per GPU"] > 0
    assert 0 < last["speed/data wait ms"] < 1e3 * last["speed/step seconds"]
    assert (records[1]["speed/seconds left"] > 0, last["speed/seconds left"]) == (True, 0)
    board = EventAccumulator(str(save / "tensorboard"))
    board.Reload()
    assert {f"speed/{name}" for name in NAMES} <= set(board.Tags()["scalars"])
    status = read_status(Path(save), time.time())
    assert (status.state, status.step, status.train_iters, status.checkpoint_step) == ("finished", 4, 4, 4)
    assert status.speed.keys() == NAMES
    assert status.losses["lm loss"] == last["lm loss"]
