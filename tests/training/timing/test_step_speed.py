"""The speed of steps, from Megatron's timer."""

from argparse import Namespace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from megatron_sfr.training.timing.step_speed import SpeedLog

ARGS = Namespace(seq_length=100, world_size=2, train_iters=10, bf16=True, fp16=False, fp8=None)
H100 = "NVIDIA H100 80GB HBM3"


def test_a_report_is_of_the_steps_since_the_last_one() -> None:
    speed = SpeedLog(H100)
    speed.waited = 0.5
    first = speed.measure(5, 1, 4.0, 8, 2e14, ARGS)  # resumed at step 4
    assert first["speed/step seconds"] == 4.0
    assert first["speed/data wait ms"] == 500.0
    assert first["speed/seconds left"] == 20.0
    second = speed.measure(7, 3, 5.0, 8, 2e14, ARGS)
    assert second["speed/step seconds"] == 0.5
    assert second["speed/data wait ms"] == 0.0
    assert second["speed/tokens per second"] == 1600
    assert second["speed/tokens per second per GPU"] == 800
    assert second["speed/TFLOPs per second per GPU"] == 200
    assert second["speed/MFU"] == pytest.approx(200 / 989.4)
    assert second["speed/peak memory GB"] > 0.01


@pytest.mark.parametrize(
    ("device", "changes", "peak"),
    [
        (None, {}, None),
        ("NVIDIA H100 PCIe", {}, None),
        (H100, {"bf16": False}, None),
        (H100, {"fp8": "hybrid"}, 1978.9),
        (H100, {}, 989.4),
    ],
)
def test_mfu_is_of_the_runs_precision_and_absent_without_a_known_peak(
    device: str | None, changes: dict, peak: float | None
) -> None:
    args = Namespace(**vars(ARGS) | changes)
    found = SpeedLog(device).measure(1, 1, 1.0, 8, 2e14, args).get("speed/MFU")
    assert found == (None if peak is None else pytest.approx(100 / peak))


def test_waits_for_batches_are_added_up() -> None:
    speed, batches = SpeedLog(None), iter([1, 2])
    assert [next(speed.timed(batches)), next(speed.timed(batches))] == [1, 2]
    assert speed.waited > 0


class Logged:
    """W&B's side: the scalars and their step."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.scalars |= {name: (value, step) for name, value in scalars.items()}


def test_wandb_gets_what_tensorboard_gets(tmp_path: Path) -> None:
    wandb = Logged()
    speed = SpeedLog(None, lambda: wandb)
    speed.write(3, {"speed/MFU": 0.5}, None)  # a rank without a writer
    assert wandb.scalars == {}
    with SummaryWriter(str(tmp_path)) as writer:
        speed.write(3, {"speed/MFU": 0.5}, writer)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.value, event.step) for event in board.Scalars("speed/MFU")] == [wandb.scalars["speed/MFU"]]
